"""Steered texts on small random models: the tokens that are edited, and the report.

Every claim is held against the brute-force splice of `support/splice.py`.
"""

import pytest
import torch
from sae_lens.analysis.compat import has_transformer_bridge
from sae_lens.load_model import HookedProxyLM
from support.splice import (
    KINDS,
    brute_force,
    brute_routing,
    clean_streams,
    close,
    route_sae,
    run,
)
from support.steering import (
    EDITS,
    NO_CHANGE,
    PROMPT,
    ROUTED,
    by_hand,
    edited_latents,
    ids_of,
    unit_of,
)

from sae_lens_route.data.kept_tokens import KeptTokens
from sae_lens_route.models.kinds import decoder_blocks
from sae_lens_route.splice import attach
from sae_lens_route.steering import (
    FeatureEdit,
    steer,
)

pytestmark = pytest.mark.usefixtures("no_gradients")

LLAMAS = [kind for kind in KINDS if kind.endswith("llama")]
GPT2S = [kind for kind in KINDS if kind.endswith("gpt2")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("where", "units"),
    [("prompt", "n(x)"), ("generated", "n(x)"), ("both", "n(x)"), ("both", "x_route")],
)
def test_steered_texts_against_brute_force(small, kind, where, units):
    """Text, blocks, weights, activations and sizes, with and without a cache."""
    model, sae = small(kind)
    hooks_before = list(model.hook_dict)
    options = {"where": where, "units": units, "max_new_tokens": 8}
    cached, uncached = (
        steer(model, sae, PROMPT, EDITS, use_cache=use_cache, **options)
        for use_cache in (True, False)
    )
    assert list(model.hook_dict) == hooks_before

    n_prompt, n_new = len(ids_of(cached, False)), len(ids_of(cached, True))
    assert n_new == 8
    assert ids_of(cached) == ids_of(uncached) and cached.text == uncached.text
    assert cached.clean_token_ids == uncached.clean_token_ids
    assert cached.clean_token_ids != tuple(ids_of(cached, True))

    # BOS is excluded; the last token is never read
    steered = torch.zeros(1, n_prompt + n_new, dtype=torch.bool)
    steered[:, 1:n_prompt] = where != "generated"
    steered[:, n_prompt:-1] = where != "prompt"
    assert [t.steered for t in cached.tokens] == steered[0].tolist()
    assert cached.n_steered == steered.sum()

    tokens = torch.tensor([ids_of(cached)])
    unit = unit_of(model, sae, tokens, units)
    f, size = by_hand(sae, steered, unit=unit), torch.zeros(1, n_prompt + n_new).double()

    def seen(here, before, after):
        relative = (after - before).norm(dim=-1) / (before - before.mean(-1, True)).norm(dim=-1)
        size[here[..., 0]] = relative[here[..., 0]]

    logits, chosen, used = brute_force(model, sae, ROUTED, f, lambda: run(model, tokens), seen=seen)
    assert logits.argmax(-1)[0, n_prompt - 1 : -1].tolist() == ids_of(cached, True)
    clean_ids = torch.tensor([[*ids_of(cached, False), *cached.clean_token_ids]])
    clean_logits = run(model, clean_ids)
    assert (
        clean_logits.argmax(-1)[0, n_prompt - 1 : -1].tolist() == clean_ids[0, n_prompt:].tolist()
    )

    _, streams = clean_streams(decoder_blocks(model), ROUTED, lambda: run(model, tokens))
    p, _ = brute_routing(sae, streams)
    z = sae.encode(used)
    features = [edit.feature for edit in EDITS]
    per_unit = 1 if units == "x_route" else unit[0, :-1]
    before = z[0, :-1, features] / per_unit
    edited = edited_latents(z, unit)[0, :-1, features] / per_unit
    after = torch.where(steered[0, :-1, None], edited, before)
    assert (before > 0).any() and len(chosen[0, :-1].unique()) > 1
    for result in (cached, uncached):
        rows = result.tokens[:-1]
        assert [t.block for t in rows] == [ROUTED[i] for i in chosen[0, :-1].tolist()]
        close(torch.tensor([t.weight for t in rows], dtype=p.dtype), p[0, :-1], 1e-6)
        close(torch.tensor([t.before for t in rows], dtype=p.dtype), before, 1e-6)
        close(torch.tensor([t.after for t in rows], dtype=p.dtype), after, 1e-6)
        sizes = torch.tensor([t.relative_size for t in rows], dtype=p.dtype)
        close(sizes, size[0, :-1], 1e-6)
        assert torch.equal(sizes > 0, steered[0, :-1])
        last = result.tokens[-1]
        assert last.block is last.weight is last.before is last.after is None
        assert last.relative_size is None


@pytest.fixture
def small_with_bos(small):
    """`small_with_bos(kind, bos)`: as `small`, with another token as BOS, so that it is written."""
    changed = []

    def make(kind, bos):
        model, sae = small(kind)
        tokenizer = model.tokenizer
        changed.append((tokenizer, tokenizer.bos_token))
        tokenizer.bos_token = tokenizer.convert_ids_to_tokens(bos)
        return model, sae

    yield make
    for tokenizer, bos in reversed(changed):
        tokenizer.bos_token = bos


RULES = {  # -1 stands for the first token that is written
    "special tokens": {"exclude_special_tokens": True},
    "nothing": {"exclude_special_tokens": False},
    "a list": {"exclude_special_tokens": [-1]},
    "positions": {"exclude_special_tokens": False, "seqpos_slice": (1, 12)},
    "positions from the end": {"seqpos_slice": (0, -4), "context_size": 16},
    "a list and positions": {"exclude_special_tokens": [-1], "seqpos_slice": [0, 12, 1]},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
def test_the_tokens_that_the_sae_keeps_are_steered(small_with_bos, small, kind, rule):
    """Read or written, with and without a cache: by their ids and by their positions."""
    options = {"max_new_tokens": 14, "where": "both"}
    metadata = {"prepend_bos": False, "exclude_special_tokens": False}
    model, sae = small(kind)
    for field, value in metadata.items():
        sae.cfg.metadata[field] = value
    free = steer(model, sae, PROMPT, EDITS, **options)
    n_prompt, first = len(ids_of(free, False)), ids_of(free, True)[0]

    model, sae = small_with_bos(kind, first)
    for field, value in (metadata | RULES[rule]).items():
        sae.cfg.metadata[field] = [first] if value == [-1] else value
    for use_cache in (True, False):
        result = steer(model, sae, PROMPT, EDITS, use_cache=use_cache, **options)
        tokens = torch.tensor([ids_of(result)])
        kept = KeptTokens.of(sae, model.tokenizer).mask(tokens)
        assert [t.steered for t in result.tokens[:-1]] == kept[0, :-1].tolist()
        f = by_hand(sae, kept, unit=unit_of(model, sae, tokens, "n(x)"))
        logits, *_ = brute_force(model, sae, ROUTED, f, lambda tokens=tokens: run(model, tokens))
        assert logits.argmax(-1)[0, n_prompt - 1 : -1].tolist() == ids_of(result, True)
        assert kept.all() == (rule == "nothing")
        written = [t for t in result.tokens[:-1] if t.generated]
        assert any(t.steered for t in written)
        assert all(t.steered for t in written) == (rule == "nothing")


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_of_one_token(small, kind):
    model, sae = small(kind)
    sae.cfg.metadata.prepend_bos = False
    sae.cfg.metadata.exclude_special_tokens = False
    sae.cfg.metadata.seqpos_slice = (0, 4)
    cached, uncached = (
        steer(model, sae, "a", EDITS, max_new_tokens=6, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert len(ids_of(cached, False)) == 1
    assert ids_of(cached) == ids_of(uncached)
    assert [t.steered for t in cached.tokens] == [True] * 4 + [False] * 3


@pytest.mark.parametrize("kind", LLAMAS)
def test_edits_that_change_nothing_give_the_clean_text(small, kind):
    model, sae = small(kind)
    for options in ({}, {"do_sample": True, "temperature": 1.5}):
        result = steer(model, sae, PROMPT, NO_CHANGE, max_new_tokens=6, seed=4, **options)
        assert result.text == result.clean_text
        assert tuple(ids_of(result, True)) == result.clean_token_ids


@pytest.mark.parametrize("kind", GPT2S)
def test_sampling(small, kind):
    model, sae = small(kind)

    def sampled(seed, **options):
        options = {"do_sample": True, "max_new_tokens": 6, **options}
        return steer(model, sae, PROMPT, EDITS, seed=seed, **options)

    state = torch.random.get_rng_state()
    first = sampled(0)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(5)
    assert sampled(0) == first
    assert ids_of(sampled(0, use_cache=False)) == ids_of(first)
    assert ids_of(sampled(1)) != ids_of(first)
    greedy = sampled(0, do_sample=False)
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        nearly_greedy = sampled(0, **options)
        assert nearly_greedy.text == greedy.text and nearly_greedy.clean_text == greedy.clean_text


def test_uniform_routing_is_drawn_again_from_its_seed(small):
    model, _ = small()
    sae = route_sae(ROUTED, routing="uniform")
    first = steer(model, sae, PROMPT, EDITS, max_new_tokens=6)
    assert {token.weight for token in first.tokens[:-1]} == {1.0}
    assert steer(model, sae, PROMPT, EDITS, max_new_tokens=6) == first


def test_how_a_prompt_begins(small, monkeypatch):
    model, sae = small()
    tokenizer = model.tokenizer
    bos, plain = tokenizer.bos_token_id, tokenizer(PROMPT, add_special_tokens=False)["input_ids"]

    def steered(**options):
        return steer(model, sae, PROMPT, EDITS, max_new_tokens=4, **options)

    with_bos = steered()
    assert ids_of(with_bos, False) == [bos, *plain]
    assert [t.steered for t in with_bos.tokens] == [False] + [True] * (len(plain) + 3) + [False]
    for excluded in (False, None, [plain[1]]):
        sae.cfg.metadata.exclude_special_tokens = excluded
        flags = [t.steered for t in steered().tokens]
        assert flags[0] and flags[1] and flags[2] == (excluded != [plain[1]])
    sae.cfg.metadata.prepend_bos = False
    assert ids_of(steered(), False) == plain
    sae.cfg.metadata.prepend_bos = True

    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}bot:"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    chat = steered()
    written = tokenizer(f"<user>{PROMPT}</>bot:", add_special_tokens=False)["input_ids"]
    assert ids_of(chat, False) == written and chat.prompt == PROMPT
    assert ids_of(steered(chat_template=False), False) == [bos, *plain]


@pytest.mark.parametrize("prompt", ["a list", "  A list", "Be brief"])
def test_a_system_prompt_is_not_steered_unless_asked(small, monkeypatch, prompt):
    """With all that the template puts before the user's text, which it strips."""
    model, sae = small()
    tokenizer = model.tokenizer
    sae.cfg.metadata.exclude_special_tokens = False
    template = (
        "<system>Be brief.</>{% for m in messages %}<user> {{ m['content'] | trim }}</>"
        "{% endfor %}bot:"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    before = tokenizer("<system>Be brief.</><user>", add_special_tokens=False)["input_ids"]
    asked, unasked = (
        steer(model, sae, prompt, EDITS, where="prompt", max_new_tokens=2, steer_system=on)
        for on in (True, False)
    )
    n_prompt = len(ids_of(asked, False))
    assert [t.steered for t in asked.tokens] == [True] * n_prompt + [False] * 2
    flags = [t.steered for t in unasked.tokens]
    assert flags == [False] * len(before) + [True] * (n_prompt - len(before)) + [False] * 2
    assert prompt.strip() in "".join(t.token for t in unasked.tokens if t.steered)


def test_large_edits_are_pointed_out(small):
    model, sae = small()

    def steered(edit):
        return steer(model, sae, PROMPT, edit, max_new_tokens=2)

    large, little = steered(FeatureEdit(3, "set", 60.0)), steered(FeatureEdit(3, "set", 0.1))
    sizes = [t.relative_size for t in large.tokens if t.steered]
    assert min(sizes) > 1
    assert f"{len(sizes)} of {len(sizes)} edits are larger" in large.warning
    assert f"up to {max(sizes):.1f} times its norm" in large.warning
    assert little.warning is None is little.to_dict()["warning"]
    assert large.to_dict()["warning"] == large.warning


@pytest.mark.parametrize("kind", GPT2S)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_tokenizer_whose_padding_is_bos(small, kind, side):
    """As GPT-2's in TransformerLens, which then looks for padding in the tokens."""
    if kind.startswith("hooked") and not has_transformer_bridge():
        pytest.skip("TransformerLens 2 looks for padding in zeros, and this BOS is token 0")
    model, sae = small(kind)
    tokenizer = model.tokenizer
    expected = steer(model, sae, PROMPT, EDITS, max_new_tokens=6)
    pad, padding_side = tokenizer.pad_token, tokenizer.padding_side
    try:
        tokenizer.pad_token, tokenizer.padding_side = tokenizer.bos_token, side
        assert steer(model, sae, PROMPT, EDITS, max_new_tokens=6) == expected
    finally:
        tokenizer.pad_token, tokenizer.padding_side = pad, padding_side


@pytest.mark.parametrize("kind", LLAMAS)
def test_the_end_of_a_text(small, kind):
    """A text ends at the tokenizer's EOS."""
    model, sae = small(kind)
    free = ids_of(steer(model, sae, PROMPT, EDITS, max_new_tokens=6), True)
    tokenizer = model.tokenizer
    stop, eos = free[3], tokenizer.eos_token
    try:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stop)
        ended = steer(model, sae, PROMPT, EDITS, max_new_tokens=6)
    finally:
        tokenizer.eos_token = eos
    assert ids_of(ended, True) == free[: free.index(stop) + 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edits": []}, "edits=\\[\\]"),
        ({"edits": [FeatureEdit(128, "set", 1.0)]}, "feature=128: the SAE has features 0 to 127"),
        ({"edits": [FeatureEdit(5, "add", 1.0), FeatureEdit(5, "ablate")]}, "feature=5: .*two"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_k": 3, "top_p": 0.5}, "top_k=3 and top_p=0.5"),
        ({"max_new_tokens": 2000}, "prompt='A list.*max_new_tokens=2000.*context of"),
        ({"prompt": "word " * 200}, "prompt='word word.*max_new_tokens=4"),
        ({"prompt": ""}, "prompt=''"),
        ({"edits": FeatureEdit(5, "set", 1.5, relative=True)}, "1.5x its maximum.*not known"),
    ],
)
@pytest.mark.parametrize("kind", ["hooked-llama", "proxy-gpt2"])
def test_mistakes_are_found_before_any_work(small, monkeypatch, kind, options, message):
    model, sae = small(kind)
    if options.get("prompt") == "":
        sae.cfg.metadata.prepend_bos = False
    options = {"prompt": PROMPT, "edits": EDITS, "max_new_tokens": 4, **options}
    inner = model.model if isinstance(model, HookedProxyLM) else model
    monkeypatch.setattr(inner, "generate", None)
    with pytest.raises(ValueError, match=message):
        steer(model, sae, **options)


def test_other_mistakes(small, monkeypatch):
    model, sae = small()
    monkeypatch.setattr(model, "generate", None)
    soft = route_sae(ROUTED, routing="soft")
    with pytest.raises(ValueError, match="routing='soft'"):
        steer(model, soft, PROMPT, EDITS)
    with attach(model, sae), pytest.raises(ValueError, match="attached already"):
        steer(model, sae, PROMPT, EDITS, max_new_tokens=2)
