"""Edits by a hook function against brute force, on every kind of model; costs and gradients.

The brute force runs the model twice with plain forward hooks: once to read the streams, from which
it routes by the formulas, and once to write f(p n(x)) / p * (std + 1e-6) + mean at the routed
tokens. It shares no code with the package but `decoder_blocks` and the SAE's encode and decode.
"""

import pytest
import torch
from sae_lens.load_model import HookedProxyLM
from support.splice import (
    KINDS,
    VOCAB,
    D,
    OnlyBlocks,
    add_everywhere,
    block_calls,
    brute_force,
    close,
    hook_of,
    hooked_model,
    route_sae,
    run,
    some_tokens,
)

from sae_lens_route.splice import attach

pytestmark = pytest.mark.usefixtures("no_gradients")

ROUTED = [2, 3, 5]
NAME = "blocks.5.route.hook_resid_post"


def zero(x):
    return torch.zeros_like(x)


def add_at_some_positions(x):
    return torch.where(torch.arange(x.shape[1]).unsqueeze(-1) % 3 == 1, 2 * x + 0.5, x)


EDITS = {"add": add_everywhere, "zero": zero, "some": add_at_some_positions}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edit", EDITS)
def test_edits_by_a_hook_function(make_model, kind, edit):
    model, routed, f = make_model(kind), [1, 2, 3, 4, 5], EDITS[edit]
    sae = route_sae(routed)
    tokens = torch.randint(2, VOCAB, (3, 11), generator=torch.Generator().manual_seed(1))
    clean = run(model, tokens)
    expected, chosen, _ = brute_force(model, sae, routed, f, lambda: run(model, tokens))
    assert len(chosen.unique()) > 2 and (expected - clean).abs().max() > 0.1
    with attach(model, sae) as handle:
        hooks = [(handle.name, hook_of(f))]
        close(model.run_with_hooks(tokens, fwd_hooks=hooks), expected)
        assert torch.equal(handle.routing.route, chosen)
        assert torch.equal(run(model, tokens), clean)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_padding(make_model, kind, padding_side):
    if (kind, padding_side) == ("bridge-llama", "left"):
        pytest.skip("this bridge gives nan for left padding in float64, with or without a splice")
    model, routed = make_model(kind), [2, 3, 4]
    sae = route_sae(routed)
    tokens = torch.randint(2, VOCAB, (3, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    mask[2, :1] = 0
    if padding_side == "right":
        mask = mask.flip(-1)
    expected, *_ = brute_force(model, sae, routed, add_everywhere, lambda: run(model, tokens, mask))
    with attach(model, sae) as handle:
        model.add_hook(handle.name, hook_of(add_everywhere))
        logits = run(model, tokens, mask)
    close(logits[mask.bool()], expected[mask.bool()])


def test_blocks_that_return_tuples():
    """As decoder layers of transformers up to 4.53 do."""
    streams = torch.randn(
        3, 2, 4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )

    class Block(torch.nn.Module):
        def __init__(self, added):
            super().__init__()
            self.added = added

        def forward(self, hidden_states):
            return hidden_states + self.added

    class InTuples(Block):
        def forward(self, hidden_states):
            return (super().forward(hidden_states), "attention weights")

    results = []
    for block_class in (InTuples, Block):
        inner = OnlyBlocks([block_class(stream) for stream in streams], width=16)
        model, sae = HookedProxyLM(inner, None), route_sae([0, 1, 2], d=16)
        with attach(model, sae) as handle:
            model.hook_dict[handle.name].add_hook(hook_of(add_everywhere))
            results.append(inner(streams[0]))
    assert torch.equal(*results)
    assert not torch.equal(results[0], streams[0] + streams.sum(0))


def test_a_pass_that_skips_routed_blocks_is_refused(make_model):
    model, sae, tokens = make_model("hooked-llama"), route_sae(ROUTED), some_tokens()
    with attach(model, sae):
        residual = model(tokens, stop_at_layer=3)
    with attach(model, sae), pytest.raises(RuntimeError, match="start at block 2 or before"):
        model(residual, start_at_layer=3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_hook_fires_when_the_pass_stops_after_it(make_model, kind):
    model, sae, tokens = make_model(kind), route_sae(ROUTED), some_tokens()
    with attach(model, sae):
        _, whole = model.run_with_cache(tokens, names_filter=[NAME])
        _, cache = model.run_with_cache(tokens, names_filter=[NAME], stop_at_layer=6)
        assert torch.equal(cache[NAME], whole[NAME])
        calls = block_calls(
            model,
            lambda: model.run_with_cache(tokens, names_filter=[NAME], stop_at_layer=6),
        )
    assert calls[:5] == [1] * 5 and calls[6:] == [0, 0]


# --- cost ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_no_block_runs_twice_unless_something_was_edited(make_model, kind):
    model, sae, tokens = make_model(kind), route_sae(ROUTED), some_tokens()
    clean, seen = run(model, tokens), []

    def read(value, hook):
        seen.append(value)
        return value

    def copy(value, hook):
        return value.clone()

    def calls_with(hook):
        return block_calls(model, lambda: model.run_with_hooks(tokens, fwd_hooks=[(NAME, hook)]))

    with attach(model, sae):
        assert block_calls(model, lambda: model.run_with_cache(tokens)) == [1] * 8
        logits, cache = model.run_with_cache(tokens, names_filter=[NAME])
        assert torch.equal(logits, clean)
        assert calls_with(read) == [1] * 8
        assert calls_with(copy) == [1] * 8
        assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=[(NAME, copy)]), clean)
        assert torch.equal(seen[-1], cache[NAME])
        assert calls_with(hook_of(add_everywhere)) == [1, 1, 1, 2, 2, 2, 1, 1]


def test_tokens_before_an_edit_are_bit_identical(make_model):
    model, sae, tokens = make_model("hooked-gpt2"), route_sae(ROUTED), some_tokens(2, 9)
    clean = model(tokens)

    def edit(value, hook):
        return torch.cat([value[:, :6], value[:, 6:] + 1], 1)

    with attach(model, sae):
        edited = model.run_with_hooks(tokens, fwd_hooks=[(NAME, edit)])
    assert torch.equal(edited[:, :6], clean[:, :6])
    assert not torch.equal(edited[:, 6:], clean[:, 6:])


# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["llama", "gpt2"])
@torch.enable_grad()
def test_gradients_against_finite_differences(style):
    """Through the edit, the activation, p of the clean half, and the blocks of both halves."""
    model = hooked_model(style, n_layers=5, d=16).requires_grad_(False)
    routed = [1, 2, 3]
    sae, tokens = route_sae(routed, d=16), some_tokens(2, 5)
    generator = torch.Generator().manual_seed(0)
    readout = torch.randn(2, 5, VOCAB, generator=generator, dtype=torch.float64)
    residual = model(tokens, stop_at_layer=0)
    shift = torch.zeros_like(residual)
    directions = torch.randn(2, *residual.shape, generator=generator, dtype=torch.float64)

    with attach(model, sae) as handle:

        def loss(residual, shift):
            hooks = [(handle.name, hook_of(lambda value: value.tanh() + shift))]
            logits = model.run_with_hooks(residual, start_at_layer=0, fwd_hooks=hooks)
            return (logits * readout).sum()

        inputs = [residual.requires_grad_(), shift.requires_grad_()]
        gradients = torch.autograd.grad(loss(*inputs), inputs)
        for i, (gradient, direction) in enumerate(zip(gradients, directions, strict=True)):
            step = [torch.zeros_like(residual), torch.zeros_like(residual)]
            step[i] = 1e-6 * direction
            with torch.no_grad():
                up = loss(residual + step[0], shift + step[1])
                down = loss(residual - step[0], shift - step[1])
            close((gradient * direction).sum(), (up - down) / 2e-6, 1e-5)


@torch.enable_grad()
def test_attribution_at_an_unchanged_hook():
    """Backward hooks and an exact error term leave the value alone; gradients flow nevertheless."""
    model = hooked_model("llama").requires_grad_(False)
    sae, tokens = route_sae(ROUTED), some_tokens()
    clean = model(tokens)
    shift = torch.zeros(*tokens.shape, D, dtype=torch.float64, requires_grad=True)
    gradients = []

    def watch(gradient, hook):
        gradients.append(gradient.clone())

    with attach(model, sae):
        hooks = [(NAME, hook_of(lambda value: value + shift))]
        logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
        assert torch.equal(logits, clean)
        (expected,) = torch.autograd.grad(logits[..., :5].sum(), shift)
        assert expected.abs().sum(-1).min() > 0

        residual = model(tokens, stop_at_layer=0).requires_grad_()
        model.add_hook(NAME, watch, dir="bwd")
        logits = model(residual, start_at_layer=0)
        assert torch.equal(logits, clean)
        logits[..., :5].sum().backward()
        model.reset_hooks()
    close(torch.stack(gradients).sum(0), expected)
