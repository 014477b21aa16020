"""A crosscoder's splice against two plain passes through the model.

In float64. Tolerances, relative and absolute: 1e-12 for one pass through the SAE, 1e-9 for a model,
1e-6 for gradients against central differences. The brute force shares no code with the package but
`decoder_blocks`.
"""

import math

import pytest
import torch
from datasets import Dataset
from sae_lens import HookedSAETransformer
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from support.crosscoders import K, crosscoder
from support.splice import (
    KINDS,
    VOCAB,
    CachedSteps,
    D,
    block_calls,
    clean_streams,
    close,
    greedy,
    hook_of,
    hooked_model,
    route_sae,
    run,
    tensor,
    with_hooks,
)

from sae_lens_route.models.kinds import decoder_blocks
from sae_lens_route.splice import RouteSAETransformer, attach

pytestmark = pytest.mark.usefixtures("no_gradients")

ROUTED = [1, 2, 4]  # block 3 lies between them and is not read
NAME = "blocks.4.stack.hook_resid_post"


def model_crosscoder(kind="relu", routed=ROUTED, width=D, seed=0):
    """A random crosscoder that changes a model."""
    metadata = SAEMetadata(
        hook_name=f"blocks.{routed[-1]}.stack.hook_resid_post",
        hook_names=[f"blocks.{b}.hook_resid_post" for b in routed],
    )
    sae = crosscoder(kind, len(routed), width, 4 * width, seed, metadata)
    with torch.no_grad():
        sae.W_dec.normal_().div_(4)
    return sae.requires_grad_(False)


def some_tokens(batch=3, length=11, seed=1):
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def brute_force(model, routed, f, run_model):
    """Logits with f in place of the stack: one pass to read, one to write."""
    blocks = decoder_blocks(model)
    _, clean = clean_streams(blocks, routed, run_model)
    mean = [x.mean(-1, keepdim=True) for x in clean]
    scale = [x.std(-1, keepdim=True) + 1e-6 for x in clean]
    normed = [(x - m) / s for x, m, s in zip(clean, mean, scale, strict=True)]
    value = torch.cat(normed, dim=-1)
    result = f(value)
    changed = (result != value).any(-1, keepdim=True)
    written = [
        part * s + m
        for part, s, m in zip(result.split(clean[0].shape[-1], -1), scale, mean, strict=True)
    ]

    def make_hook(index):
        def hook(module, args, output):
            if index not in routed:
                return None
            x = torch.where(changed, written[routed.index(index)], tensor(output))
            return (x, *output[1:]) if isinstance(output, tuple) else x

        return hook

    return with_hooks(blocks, make_hook, run_model), value


def shift(x):
    return x + torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype)


def some_positions(x):
    return torch.where(torch.arange(x.shape[1]).unsqueeze(-1) % 3 == 1, 2 * x + 0.5, x)


def one_layer_of_some_texts(x):
    changed = x.clone()
    changed[1:, 2:6, :D] += torch.linspace(-1, 1, D)  # later tokens attend to it
    return changed


EDITS = {
    "shift": shift,
    "zero": torch.zeros_like,
    "some positions": some_positions,
    "one layer of some texts": one_layer_of_some_texts,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edit", EDITS)
def test_edits_by_a_hook_function(make_model, kind, edit):
    model, sae, f, tokens = make_model(kind), model_crosscoder(), EDITS[edit], some_tokens()
    clean = run(model, tokens)
    expected, value = brute_force(model, ROUTED, f, lambda: run(model, tokens))
    assert (expected - clean).abs().max() > 0.1
    with attach(model, sae) as handle:
        hooks = [(NAME, hook_of(f))]
        close(model.run_with_hooks(tokens, fwd_hooks=hooks), expected)
        close(model.run_with_cache(tokens, names_filter=[NAME])[1][NAME], value, 1e-12)
        assert handle.routed_blocks == ROUTED
        assert torch.equal(run(model, tokens), clean)
    assert NAME not in model.hook_dict


@pytest.mark.parametrize("kind", KINDS)
def test_a_crosscoder_of_the_old_hook_name(make_model, kind):
    model, sae, tokens = make_model(kind), model_crosscoder(), some_tokens()
    sae.cfg.metadata.hook_name = name = "blocks.4.hook_resid_stack"
    expected, _ = brute_force(model, ROUTED, shift, lambda: run(model, tokens))
    with attach(model, sae):
        close(model.run_with_hooks(tokens, fwd_hooks=[(name, hook_of(shift))]), expected)
    assert name not in model.hook_dict


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_edited_is_bit_identical_and_runs_once(make_model, kind):
    model, sae, tokens = make_model(kind), model_crosscoder(), some_tokens()
    clean, fired = run(model, tokens), []

    def copy(value, hook):
        return value.clone()

    def edit(value, hook):
        fired.append(value)
        return value + 1

    def calls_with(hook):
        return block_calls(model, lambda: model.run_with_hooks(tokens, fwd_hooks=[(NAME, hook)]))

    with attach(model, sae):
        assert torch.equal(run(model, tokens), clean)
        assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=[(NAME, copy)]), clean)
        assert calls_with(copy) == [1] * 8
        assert calls_with(edit) == [1, 1, 2, 2, 2, 1, 1, 1]
        assert len(fired) == 1


def test_tokens_before_an_edit_are_bit_identical(make_model):
    model, sae, tokens = make_model("hooked-gpt2"), model_crosscoder(), some_tokens()
    clean = model(tokens)

    def edit(value, hook):
        return torch.cat([value[:, :6], value[:, 6:] + 1], 1)

    with attach(model, sae):
        edited = model.run_with_hooks(tokens, fwd_hooks=[(NAME, edit)])
    assert torch.equal(edited[:, :6], clean[:, :6])
    assert not torch.equal(edited[:, 6:], clean[:, 6:])


def test_earlier_edits_matter_through_tokens_that_were_left(make_model):
    """Where all tokens are edited, the last block's part alone decides; else all parts matter."""
    model, sae, tokens = make_model("hooked-llama"), model_crosscoder(), some_tokens()

    def edit(first_part, start):
        def hook(value, hook):
            value = value.clone()
            value[:, start:] += 0.5
            value[:, start:, :D] += first_part
            return value

        return model.run_with_hooks(tokens, fwd_hooks=[(NAME, hook)])

    with attach(model, sae):
        assert torch.equal(edit(0.0, 0), edit(1.0, 0))
        some, other = edit(0.0, 5), edit(1.0, 5)
        assert torch.equal(some, other)  # the clean tokens are all before them, and cannot attend

        def odd(value, hook, first_part):
            value = value.clone()
            value[:, 1::2, :D] += first_part
            return value

        one, two = (
            model.run_with_hooks(tokens, fwd_hooks=[(NAME, lambda v, hook, a=a: odd(v, hook, a))])
            for a in (1.0, 2.0)
        )
        close(one[:, :2], two[:, :2])
        assert (one[:, 2] - two[:, 2]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["relu", "topk"])
def test_a_crosscoder_added_to_the_model(kind):
    """Spliced in by SAELens: with and without the error term, and excluding tokens."""
    model, sae = hooked_model("llama", RouteSAETransformer), model_crosscoder(kind)
    tokens = some_tokens()
    clean, hook_dict = model(tokens), list(model.hook_dict)

    def reconstruct(value):
        return sae.decode(sae.encode(value))

    expected, value = brute_force(model, ROUTED, reconstruct, lambda: model(tokens))
    assert (expected - clean).abs().max() > 0.1
    close(model.run_with_saes(tokens, saes=[sae]), expected)
    close(model.run_with_saes(tokens, saes=[sae], use_error_term=True), clean)
    logits, cache = model.run_with_cache_with_saes(tokens, saes=[sae])
    close(logits, expected)
    close(cache[f"{NAME}.hook_sae_acts_post"], sae.encode(value))

    special = [int(tokens[0, 0]), int(tokens[1, 3])]
    left_out = torch.isin(tokens, torch.tensor(special)).unsqueeze(-1)

    def reconstruct_the_others(value):
        return torch.where(left_out, value, reconstruct(value))

    expected, _ = brute_force(model, ROUTED, reconstruct_the_others, lambda: model(tokens))
    close(model.run_with_saes(tokens, saes=[sae], exclude_special_tokens=special), expected)
    assert list(model.hook_dict) == hook_dict
    assert torch.equal(model(tokens), clean)


@pytest.mark.parametrize("kind", KINDS)
def test_cached_steps_with_edits_in_some(make_model, kind):
    model, sae, sizes, edited = make_model(kind), model_crosscoder(), [4, 3, 1, 1, 4, 1], [5, 8, 13]
    tokens, n_seen = some_tokens(3, sum(sizes)), 0
    mask = torch.ones_like(tokens)

    def edit(value):
        positions = torch.arange(value.shape[1]) + n_seen
        return torch.where(
            torch.isin(positions, torch.tensor(edited)).unsqueeze(-1), 2 * value + 1, value
        )

    expected, _ = brute_force(model, ROUTED, edit, lambda: run(model, tokens, mask))
    with attach(model, sae):
        model.hook_dict[NAME].add_hook(hook_of(edit))
        steps, logits = CachedSteps(model, 3), []
        for new in tokens.split(sizes, dim=1):
            logits.append(steps.step(new, mask, n_seen))
            n_seen += new.shape[1]
    close(torch.cat(logits, 1), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edit", [shift, some_positions])
def test_greedy_generation(make_model, kind, edit):
    """24 tokens: cached, uncached and by brute force, all the same."""
    model, sae, n_prompt = make_model(kind), model_crosscoder(), 6
    prompts, n_seen = some_tokens(2, n_prompt), 0

    def at_position(value):  # a cached step sees the new token only
        start = n_seen if value.shape[1] == 1 else 0
        padding = value.new_zeros(value.shape[0], start, value.shape[2])
        return edit(torch.cat([padding, value], 1))[:, start:]

    def hook(value, hook):
        nonlocal n_seen
        result = at_position(value)
        n_seen = n_seen + 1 if value.shape[1] == 1 else value.shape[1]
        return result

    clean = greedy(model, prompts, cached=True, n=24)
    with attach(model, sae):
        assert torch.equal(greedy(model, prompts, cached=True, n=24), clean)
        model.hook_dict[NAME].add_hook(hook)
        cached = greedy(model, prompts, cached=True, n=24)
        assert torch.equal(greedy(model, prompts, cached=False, n=24), cached)
    assert not torch.equal(cached, clean)
    logits, _ = brute_force(model, ROUTED, edit, lambda: run(model, cached))
    assert torch.equal(logits.argmax(-1)[:, n_prompt - 1 : -1], cached[:, n_prompt:])


@pytest.mark.parametrize("left_out", [[], [0, 3]])
@torch.enable_grad()
def test_gradients_of_a_splice_against_central_differences(left_out):
    """Through the edit, the clean stack, its mean and scale, and the tokens that were left."""
    model = hooked_model("llama", n_layers=6, d=16).requires_grad_(False)
    sae, tokens = model_crosscoder(width=16), some_tokens(2, 5)
    generator = torch.Generator().manual_seed(0)
    readout = torch.randn(2, 5, VOCAB, generator=generator, dtype=torch.float64)
    residual = model(tokens, stop_at_layer=0)
    added = torch.zeros(2, 5, 48, dtype=torch.float64)
    is_left = torch.isin(torch.arange(5), torch.tensor(left_out)).unsqueeze(-1)

    def edit(value, added):
        return torch.where(is_left, value, value.tanh() + added)

    with attach(model, sae):

        def loss(residual, added):
            hooks = [(NAME, lambda value, hook: edit(value, added))]
            logits = model.run_with_hooks(residual, start_at_layer=0, fwd_hooks=hooks)
            return (logits * readout).sum()

        inputs = [residual.requires_grad_(), added.requires_grad_()]
        gradients = torch.autograd.grad(loss(*inputs), inputs)
        for i, gradient in enumerate(gradients):
            direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
            step = [torch.zeros_like(residual), torch.zeros_like(added)]
            step[i] = 1e-6 * direction
            with torch.no_grad():
                up = loss(residual + step[0], added + step[1])
                down = loss(residual - step[0], added - step[1])
            close((gradient * direction).sum(), (up - down) / 2e-6, 1e-6)


@torch.enable_grad()
def test_attribution_at_an_unchanged_hook():
    """A hook that changes nothing but carries a gradient: that of adding to every stream."""
    model, sae = hooked_model("llama").requires_grad_(False), model_crosscoder()
    tokens = some_tokens(2, 7)
    clean, streams_ = clean_streams(decoder_blocks(model), ROUTED, lambda: model(tokens))
    shift = torch.zeros(2, 7, len(ROUTED) * D, dtype=torch.float64, requires_grad=True)

    def make_hook(index):
        def hook(module, args, output):
            if index in ROUTED:
                i = ROUTED.index(index)
                scale = streams_[i].std(-1, keepdim=True) + 1e-6
                return output + shift[..., i * D : (i + 1) * D] * scale
            return None

        return hook

    added = with_hooks(decoder_blocks(model), make_hook, lambda: model(tokens))
    (expected,) = torch.autograd.grad(added[..., :5].sum(), shift)
    assert expected.view(2, 7, len(ROUTED), D).abs().sum(-1).min() > 0
    with attach(model, sae):
        hooks = [(NAME, hook_of(lambda value: value + shift))]
        logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
    assert torch.equal(logits, clean)
    close(torch.autograd.grad(logits[..., :5].sum(), shift)[0], expected)


def test_what_cannot_be_attached(make_model):
    model, sae = make_model("hooked-llama"), model_crosscoder()
    with pytest.raises(ValueError, match="unscaled=True"):
        attach(model, sae, unscaled=True)
    with pytest.raises(ValueError, match="width 16, the model has width 32"):
        attach(model, model_crosscoder(width=16))
    with attach(model, sae), pytest.raises(ValueError, match="has a Crosscoder attached already"):
        attach(model, route_sae([4, 5]))
    with (
        attach(model, route_sae([4, 5])),
        pytest.raises(ValueError, match="has a RouteTopKSAE attached already"),
    ):
        attach(model, sae)
    with attach(model, sae) as crosscoder_hook, attach(model, route_sae([5, 6])) as routed_hook:
        assert {crosscoder_hook.name, routed_hook.name} <= set(model.hook_dict)
    with attach(model, sae), pytest.raises(ValueError, match=r"returned \[3, 11, 1\]"):
        model.run_with_hooks(some_tokens(), fwd_hooks=[(NAME, hook_of(lambda x: x[..., :1]))])


@pytest.mark.parametrize("kind", ["relu", "topk"])
def test_run_evals_with_everything_on(kind):
    model, sae = hooked_model("llama", HookedSAETransformer), model_crosscoder(kind)
    for field, value in {"context_size": 12, "prepend_bos": True, "dataset_path": "none"}.items():
        sae.cfg.metadata[field] = value
    tokens = some_tokens(40, 12)
    tokens[:, 0] = 0
    store = ActivationsStore.from_sae(
        model,
        sae,
        dataset=Dataset.from_dict({"tokens": tokens.tolist()}),
        streaming=False,
        store_batch_size_prompts=4,
        n_batches_in_buffer=2,
        train_batch_size_tokens=12,
    )
    everything = get_eval_everything_config(
        batch_size_prompts=4,
        n_eval_reconstruction_batches=2,
        n_eval_sparsity_variance_batches=2,
    )
    with attach(model, sae):
        metrics, features = run_evals(
            sae, store, model, ActivationScaler(), everything, exclude_special_tokens=[0, 1]
        )
    numbers = {name: value for group in metrics.values() for name, value in group.items()}
    assert all(math.isfinite(value) for value in numbers.values())
    assert numbers["kl_div_with_sae"] > 0.01 and numbers["kl_div_with_ablation"] > 0.01
    # every n(x_i) has squared norm d - 1
    assert numbers["l2_norm_in"] == pytest.approx((len(ROUTED) * (D - 1)) ** 0.5, rel=1e-4)
    assert 0 < numbers["l0"] <= (K if kind == "topk" else sae.cfg.d_sae)
    assert len(features["feature_density"]) == sae.cfg.d_sae
