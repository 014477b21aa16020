"""A pass is valid or raises: early ends, other orders, nested calls, checkpointing, compilation."""

import copy

import pytest
import torch
from sae_lens.load_model import HookedProxyLM
from support.splice import (
    KINDS,
    CachedSteps,
    add_everywhere,
    brute_force,
    close,
    hf_model,
    hook_of,
    hooked_model,
    hooks_on,
    route_sae,
    run,
    some_tokens,
)

from sae_lens_route.models.kinds import block_loop, decoder_blocks
from sae_lens_route.splice import attach

pytestmark = pytest.mark.usefixtures("no_gradients")

ROUTED = [1, 2, 4]
HOOKED = [kind for kind in KINDS if kind.startswith("hooked")]


class Planned(Exception):
    pass


def fail_in(block, calls=1):
    """The block raises when it is called for the n-th time; 2 is the replay."""
    n = 0

    def fail(module, args):
        nonlocal n
        n += 1
        if n == calls:
            raise Planned

    return block.register_forward_pre_hook(fail)


def edited(model, sae, tokens):
    return brute_force(model, sae, ROUTED, add_everywhere, lambda: run(model, tokens))[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("block", "calls"), [(0, 1), (3, 1), (4, 2), (6, 1)])
def test_a_pass_after_one_that_failed(make_model, kind, block, calls):
    """In the clean half, in the replay, before and after the routed blocks; then another shape."""
    model, sae, tokens = make_model(kind), route_sae(ROUTED), some_tokens(3, 5)
    expected = edited(model, sae, tokens)
    with attach(model, sae) as handle:
        model.hook_dict[handle.name].add_hook(hook_of(add_everywhere))
        failing = fail_in(decoder_blocks(model)[block], calls)
        with pytest.raises(Planned):
            run(model, some_tokens(2, 9))
        failing.remove()
        close(run(model, tokens), expected)


@pytest.mark.parametrize("kind", HOOKED)
@pytest.mark.parametrize("start", [2, 3, 4])
@pytest.mark.parametrize("error", [Planned, KeyboardInterrupt, None])
def test_streams_of_a_pass_that_ended_early_are_not_used(make_model, kind, start, error):
    """The next pass begins where that one ended, with the same shape, and would complete it."""
    model, sae = make_model(kind), route_sae(ROUTED)
    first, second = some_tokens(seed=1), some_tokens(seed=2)
    streams = model(second, stop_at_layer=start)

    def stop(module, args):
        raise error

    with attach(model, sae):
        if error is None:
            model(first, stop_at_layer=start)
        else:
            stopping = model.blocks[start].register_forward_pre_hook(stop)
            with pytest.raises(error):
                model(first)
            stopping.remove()
        with pytest.raises(RuntimeError, match="start at block 1 or before"):
            model(streams, start_at_layer=start)
        with pytest.raises(RuntimeError, match="start at block 1 or before"):
            for block in model.blocks[start:]:
                streams = block(streams)


def test_blocks_called_one_by_one_are_a_pass(make_model):
    model, sae, tokens = make_model("hooked-gpt2"), route_sae(ROUTED), some_tokens()
    expected = edited(model, sae, tokens)
    with attach(model, sae) as handle:
        model.hook_dict[handle.name].add_hook(hook_of(add_everywhere))
        for _ in range(2):
            x = model(tokens, stop_at_layer=0)
            for block in model.blocks:
                x = block(x)
            close(model(x, start_at_layer=len(model.blocks)), expected)


@pytest.mark.parametrize("order", [[1, 1, 2, 3, 4], [1, 2, 3, 3, 4], [1, 2, 4], [2, 1, 2, 3, 4]])
def test_blocks_repeated_or_skipped_are_refused(order):
    model, sae, tokens = hooked_model("gpt2"), route_sae(ROUTED), some_tokens()
    blocks = model.blocks
    with attach(model, sae):
        model.blocks = torch.nn.ModuleList(blocks[i] for i in (0, *order, 5, 6, 7))
        with pytest.raises(RuntimeError, match="skips or repeats a block"):
            model(tokens)
        model.blocks = blocks
        model(tokens)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [0, 3, 6])
def test_a_hook_that_calls_the_model(make_model, kind, block):
    """Before, in and after the routed blocks; in the clean half and in the replay."""
    model, sae = make_model(kind), route_sae(ROUTED)
    outer, inner = some_tokens(3, 5), some_tokens(2, 9, seed=1)
    expected, nested = (edited(model, sae, tokens) for tokens in (outer, inner))
    results, busy = [], []

    def call(module, args, output):
        if not busy:
            busy.append(True)
            results.append(run(model, inner))
            results.append(handle.routing.route.shape)
            busy.clear()

    with attach(model, sae) as handle:
        model.hook_dict[handle.name].add_hook(hook_of(add_everywhere))
        calling = decoder_blocks(model)[block].register_forward_hook(call)
        close(run(model, outer), expected)
        calling.remove()
        assert handle.routing.route.shape == outer.shape
    assert len(results) == (4 if block == 3 else 2)
    for logits in results[::2]:
        close(logits, nested)


def test_a_hook_that_calls_a_routed_block_is_refused(make_model):
    model, sae, tokens = make_model("hooked-llama"), route_sae(ROUTED), some_tokens()
    with attach(model, sae) as handle:
        model.hook_dict[handle.name].add_hook(hook_of(add_everywhere))
        model.hook_dict[handle.name].add_hook(
            lambda value, hook: model.blocks[3](value) * 0 + value
        )
        with pytest.raises(RuntimeError, match="start at block 1 or before"):
            model(tokens)


def test_removing_the_hook_within_a_pass_is_refused(make_model):
    model, sae, tokens = make_model("hooked-llama"), route_sae(ROUTED), some_tokens()
    clean = model(tokens)
    handle = attach(model, sae)

    def remove(value, hook):
        handle.remove()
        return value + 1

    model.hook_dict[handle.name].add_hook(remove)
    with pytest.raises(RuntimeError, match="between passes, not in one"):
        model(tokens)
    assert torch.equal(model(tokens), clean)


# --- key-value caches ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("was_edited", [False, True])
@pytest.mark.parametrize(("block", "calls"), [(2, 1), (3, 1), (3, 2), (6, 1)])
def test_a_cache_of_a_pass_that_failed_is_refused(make_model, kind, was_edited, block, calls):
    """Blocks have written to it or not, in the clean half or both, before or after edits."""
    model, sae, mask = make_model(kind), route_sae(ROUTED), torch.ones(2, 9, dtype=torch.long)
    tokens = some_tokens(2, 9)
    with attach(model, sae) as handle:
        point, steps = model.hook_dict[handle.name], CachedSteps(model, 2)
        if was_edited:
            point.add_hook(hook_of(add_everywhere))
        steps.step(tokens[:, :4], mask, 0)
        if not was_edited:
            point.add_hook(hook_of(add_everywhere))
        failing = fail_in(decoder_blocks(model)[block], calls)
        with pytest.raises(Planned):
            steps.step(tokens[:, 4:6], mask, 4)
        failing.remove()
        with pytest.raises(RuntimeError, match="use a new cache"):
            steps.step(tokens[:, 4:6], mask, 4)


def test_a_frozen_cache_outlives_a_pass_that_failed(make_model):
    model, sae, mask = make_model("hooked-llama"), route_sae(ROUTED), torch.ones(2, 9).long()
    tokens = some_tokens(2, 9)
    with attach(model, sae) as handle:
        steps = CachedSteps(model, 2)
        steps.step(tokens[:, :4], mask, 0)
        steps.cache.freeze()
        failing = fail_in(model.blocks[3])
        with pytest.raises(Planned):
            steps.step(tokens[:, 4:], mask, 4)
        failing.remove()
        close(steps.step(tokens[:, 4:], mask, 4), model(tokens)[:, 4:])
        assert handle.routing is not None


def test_a_cache_with_edits_at_other_blocks_is_refused(make_model):
    """Block 3 would have to run again, which the first routed block never does."""
    model, mask, tokens = make_model("proxy-llama"), torch.ones(2, 7).long(), some_tokens()
    steps = CachedSteps(model, 2)
    with attach(model, route_sae(ROUTED)) as handle:
        model.hook_dict[handle.name].add_hook(hook_of(add_everywhere))
        steps.step(tokens[:, :4], mask, 0)
    with attach(model, route_sae([3, 5])), pytest.raises(RuntimeError, match="use a new cache"):
        steps.step(tokens[:, 4:], mask, 4)


# --- blocks that run in other ways ---------------------------------------------------------------


@torch.enable_grad()
def test_gradient_checkpointing_gives_the_same_gradients_or_is_refused():
    """Transformers 5 recomputes a block's `forward`, earlier ones its hooks as well."""
    sae, tokens, gradients = route_sae(ROUTED), some_tokens(), []
    for checkpointing in (False, True):
        model = HookedProxyLM(hf_model("llama"), None)
        model.model.train()
        if checkpointing:
            model.model.gradient_checkpointing_enable({"use_reentrant": False})
        with attach(model, sae) as handle:
            model.hook_dict[handle.name].add_hook(hook_of(add_everywhere))
            loss = run(model, tokens).square().mean()
            try:
                loss.backward()
            except RuntimeError as error:
                assert checkpointing and "gradient checkpointing" in str(error)
                return
        gradients.append([parameter.grad for parameter in model.model.parameters()])
    assert any(gradient.abs().max() > 0 for gradient in gradients[0])
    for plain, checkpointed in zip(*gradients, strict=True):
        close(checkpointed, plain)


@pytest.mark.parametrize("kind", ["hooked-llama", "proxy-llama"])
def test_a_copy_of_an_attached_model_has_a_hook_of_its_own(make_model, kind):
    model, sae, tokens = copy.deepcopy(make_model(kind)), route_sae(ROUTED), some_tokens()
    clean, expected = run(model, tokens), edited(model, sae, tokens)
    with attach(model, sae) as handle:
        other = copy.deepcopy(model)
        other.hook_dict[handle.name].add_hook(hook_of(add_everywhere))
        close(run(other, tokens), expected)
        assert torch.equal(run(model, tokens), clean)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_restored_in_any_order_of_removing(make_model, kind):
    model, early, late = make_model(kind), route_sae([1, 2]), route_sae([3, 4])
    before, hooks = block_loop(model).forward, hooks_on(model)
    for removed in (0, 1):
        handles = [attach(model, early), attach(model, late)]
        assert block_loop(model).forward != before
        handles.pop(removed).remove()
        handles[0].remove()
        assert block_loop(model).forward == before
        assert hooks_on(model) == hooks
