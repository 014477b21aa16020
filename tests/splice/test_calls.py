"""Splices with a key-value cache: cached and uncached passes agree."""

import pytest
import torch
from sae_lens.load_model import HookedProxyLM
from support.splice import (
    KINDS,
    VOCAB,
    CachedSteps,
    add_everywhere,
    brute_force,
    close,
    greedy,
    hook_of,
    route_sae,
    run,
    tokenizer,
)

from sae_lens_route.splice import attach

pytestmark = pytest.mark.usefixtures("no_gradients")

ROUTED, N_LAYERS = [1, 2, 4], 6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [False, True])
def test_cached_steps_with_several_edits(make_model, kind, padded):
    """Edits in some steps and none in others, before, between and after them."""
    if padded and kind == "bridge-llama":
        pytest.skip("this bridge gives nan for left padding in float64, with or without a splice")
    model, sae = make_model(kind, N_LAYERS), route_sae(ROUTED)
    batch, sizes, edited = 3, [4, 3, 1, 1, 4, 1], [5, 6, 8, 13]
    tokens = torch.randint(
        2, VOCAB, (batch, sum(sizes)), generator=torch.Generator().manual_seed(4)
    )
    mask = torch.ones_like(tokens)
    if padded:
        mask[1, :3] = 0
        mask[2, :1] = 0
    n_seen = 0

    def edit(value):
        positions = torch.arange(value.shape[1]) + n_seen
        return torch.where(
            torch.isin(positions, torch.tensor(edited)).unsqueeze(-1), 2 * value + 1, value
        )

    expected, chosen, _ = brute_force(model, sae, ROUTED, edit, lambda: run(model, tokens, mask))
    with attach(model, sae) as handle:
        model.hook_dict[handle.name].add_hook(hook_of(edit))
        steps, logits = CachedSteps(model, batch), []
        for new in tokens.split(sizes, dim=1):
            logits.append(steps.step(new, mask, n_seen))
            assert torch.equal(
                handle.routing.route[mask[:, n_seen : n_seen + new.shape[1]].bool()],
                chosen[:, n_seen : n_seen + new.shape[1]][
                    mask[:, n_seen : n_seen + new.shape[1]].bool()
                ],
            )
            n_seen += new.shape[1]
    close(torch.cat(logits, 1)[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_generation(make_model, kind):
    """64 tokens: cached, uncached and by brute force, all the same."""
    model, sae = make_model(kind, N_LAYERS), route_sae(ROUTED, seed=1)
    prompts = torch.randint(2, VOCAB, (4, 6), generator=torch.Generator().manual_seed(5))
    clean = greedy(model, prompts, cached=True, n=8)
    with attach(model, sae) as handle:
        assert torch.equal(greedy(model, prompts, cached=True, n=8), clean)
        model.hook_dict[handle.name].add_hook(hook_of(add_everywhere))
        cached = greedy(model, prompts, cached=True)
        assert torch.equal(greedy(model, prompts, cached=False), cached)
        assert torch.equal(greedy(model, prompts[:1], cached=True), cached[:1])
        assert torch.equal(greedy(model, prompts[:1], cached=False), cached[:1])
    assert not torch.equal(cached[:, :14], clean)
    assert torch.equal(greedy(model, prompts, cached=True, n=8), clean)
    logits, *_ = brute_force(model, sae, ROUTED, add_everywhere, lambda: run(model, cached))
    assert torch.equal(logits.argmax(-1)[:, 5:-1], cached[:, 6:])


@pytest.mark.parametrize("kind", sorted({"hooked-gpt2", "proxy-llama", "bridge-gpt2"} & {*KINDS}))
def test_greedy_generation_of_texts_padded_on_the_left(make_model, kind):
    model, sae = make_model(kind, N_LAYERS), route_sae(ROUTED, seed=1)
    texts = ["Return the value", "HTTP", "A list of header names and", "to"]

    def generate(cached, n=64):
        if isinstance(model, HookedProxyLM):
            padding = tokenizer()
            padding.padding_side, padding.pad_token_id = "left", 1
            inputs = padding(texts, return_tensors="pt", padding=True)
            assert not inputs["attention_mask"].all()
            return model.model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                do_sample=False,
                max_new_tokens=n,
                min_new_tokens=n,
                use_cache=cached,
                pad_token_id=1,
            )
        return model.generate(
            texts,
            max_new_tokens=n,
            do_sample=False,
            stop_at_eos=False,
            use_past_kv_cache=cached,
            return_type="tokens",
            verbose=False,
        )

    clean = generate(True, n=8)
    with attach(model, sae) as handle:
        model.hook_dict[handle.name].add_hook(hook_of(add_everywhere))
        cached = generate(True)
        assert torch.equal(generate(False), cached)
    assert not torch.equal(cached[:, : clean.shape[1]], clean)


def test_generation_with_an_sae_added(make_model):
    """SAELens's wrapper at the hook, in the inference mode that `generate` switches on."""
    model, sae = make_model("hooked-llama", N_LAYERS), route_sae(ROUTED, seed=1)
    prompts = torch.randint(2, VOCAB, (2, 6), generator=torch.Generator().manual_seed(5))
    with attach(model, sae), model.saes([sae]):
        cached = greedy(model, prompts, cached=True, n=32)
        assert torch.equal(greedy(model, prompts, cached=False, n=32), cached)
    logits, *_ = brute_force(
        model, sae, ROUTED, lambda x: sae.decode(sae.encode(x)), lambda: run(model, cached)
    )
    assert torch.equal(logits.argmax(-1)[:, 5:-1], cached[:, 6:])


def test_an_edit_in_place_is_seen_in_inference_mode(make_model):
    model, sae = make_model("hooked-llama", N_LAYERS), route_sae(ROUTED)
    tokens = torch.randint(2, VOCAB, (2, 6), generator=torch.Generator().manual_seed(5))

    def in_place(value, hook):
        value[:, 2:4] *= 3

    def edit(value):
        return torch.cat([value[:, :2], 3 * value[:, 2:4], value[:, 4:]], 1)

    expected, *_ = brute_force(model, sae, ROUTED, edit, lambda: model(tokens))
    with attach(model, sae) as handle:
        for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
            with mode():
                logits = model.run_with_hooks(tokens, fwd_hooks=[(handle.name, in_place)])
            close(logits.detach(), expected)


@pytest.mark.parametrize("kind", ["hooked-llama", "proxy-llama"])
def test_a_cache_that_something_else_changed_is_refused(make_model, kind):
    model, sae = make_model(kind, N_LAYERS), route_sae(ROUTED)
    tokens = torch.randint(2, VOCAB, (2, 6), generator=torch.Generator().manual_seed(5))
    mask = torch.ones(2, 12, dtype=torch.long)
    with attach(model, sae) as handle:
        point = model.hook_dict[handle.name]
        point.add_hook(hook_of(add_everywhere))
        steps = CachedSteps(model, 2)
        steps.step(tokens, mask, 0)
        entry = steps.cache[2] if steps.hooked else steps.cache.layers[2]
        for name in ("past_keys", "past_values") if steps.hooked else ("keys", "values"):
            setattr(entry, name, getattr(entry, name).flip(0))
        with pytest.raises(RuntimeError, match="reordered"):
            steps.step(tokens, mask, 6)


def test_a_frozen_cache_is_read_and_not_written(make_model):
    """TransformerLens's way of running many continuations after one prefix."""
    model, sae = make_model("hooked-llama", N_LAYERS), route_sae(ROUTED)
    generator = torch.Generator().manual_seed(6)
    prefix, a, b = torch.randint(2, VOCAB, (3, 2, 4), generator=generator)
    mask = torch.ones(2, 8, dtype=torch.long)
    with attach(model, sae) as handle:
        model.hook_dict[handle.name].add_hook(hook_of(add_everywhere))
        steps = CachedSteps(model, 2)
        steps.step(prefix, mask, 0)
        steps.cache.freeze()
        logits = [steps.step(end, mask, 4) for end in (a, b, a)]
        for end, continued in zip((a, b, a), logits, strict=True):
            close(continued, model(torch.cat([prefix, end], 1))[:, 4:])


def test_a_cache_written_in_place_is_refused(make_model):
    from transformers import StaticCache

    model, sae = make_model("proxy-llama", N_LAYERS), route_sae(ROUTED)
    tokens = torch.randint(2, VOCAB, (2, 6), generator=torch.Generator().manual_seed(5))

    def logits():
        cache = StaticCache(config=model.model.config, max_cache_len=16)
        return model.model(tokens, past_key_values=cache).logits

    clean = logits()
    with attach(model, sae) as handle:
        assert torch.equal(logits(), clean)
        model.hook_dict[handle.name].add_hook(hook_of(add_everywhere))
        with pytest.raises(ValueError, match="DynamicCache"):
            logits()
