"""Several threads on one attached model: results are right or refused."""

import importlib.util
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support.splice import (
    KINDS,
    add_everywhere,
    brute_force,
    close,
    hook_of,
    route_sae,
    run,
    some_tokens,
)

from sae_lens_route.models.kinds import decoder_blocks
from sae_lens_route.saes.routed import with_routes
from sae_lens_route.splice import attach

pytestmark = pytest.mark.usefixtures("no_gradients")

ROUTED = [1, 2, 4]
NAME = "blocks.4.route.hook_resid_post"
WITH_SAES = [kind for kind in KINDS if not kind.startswith("proxy")]
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "reliability" / "hook_stress.py"


def in_a_thread(function, *args):
    """The result or exception of a call in another thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.no_grad()(function), *args).result(timeout=60)


def edited(model, sae, tokens):
    return brute_force(model, sae, ROUTED, add_everywhere, lambda: run(model, tokens))[0]


def within_block(model, block, work):
    """Do the work in another thread while this one is in a block."""

    def hook(module, args):
        if threading.get_ident() == here:
            results.append(in_a_thread(work))

    results, here = [], threading.get_ident()
    handle = decoder_blocks(model)[block].register_forward_pre_hook(hook)
    return handle, results


@pytest.mark.parametrize("kind", KINDS)
def test_overlapping_passes_with_one_function_at_the_hook(make_model, kind):
    """A whole pass of another thread runs in each block of this one's clean half and replay."""
    model, sae = make_model(kind), route_sae(ROUTED)
    mine, other = some_tokens(3, 5), some_tokens(2, 9, seed=1)
    expected, expected_other = edited(model, sae, mine), edited(model, sae, other)
    with attach(model, sae) as hook:
        model.hook_dict[NAME].add_hook(hook_of(add_everywhere))

        def work():
            return run(model, other), hook.routing.route.shape

        runs = [within_block(model, block, work) for block in (0, 2, 3, 6)]
        close(run(model, mine), expected)
        assert hook.routing.route.shape == mine.shape
        for handle, results in runs:
            handle.remove()
            for logits, shape in results:
                close(logits, expected_other)
                assert shape == other.shape
    assert [len(results) for _, results in runs] == [1, 2, 2, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_temporary_hooks_belong_to_their_thread(make_model, kind):
    model, sae, tokens = make_model(kind), route_sae(ROUTED), some_tokens()
    clean, expected = run(model, tokens), edited(model, sae, tokens)
    hooks = [(NAME, hook_of(add_everywhere))]
    with attach(model, sae):
        handle = model.hook_dict[NAME]
        handle.add_hook(hook_of(add_everywhere), level=1)
        with pytest.raises(RuntimeError, match="hooks that another thread added"):
            in_a_thread(run, model, tokens)
        close(run(model, tokens), expected)
        handle.remove_hooks(level=1)
        close(in_a_thread(lambda: model.run_with_hooks(tokens, fwd_hooks=hooks)), expected)
        assert torch.equal(in_a_thread(run, model, tokens), clean)
        assert torch.equal(run(model, tokens), clean)


def test_a_pass_with_temporary_hooks_is_refused_if_another_overlaps(make_model):
    model, sae, tokens = make_model("hooked-gpt2"), route_sae(ROUTED), some_tokens()
    with attach(model, sae):
        handle, results = within_block(model, 0, lambda: model(tokens, stop_at_layer=1))
        with pytest.raises(RuntimeError, match="passes of two threads overlap"):
            model.run_with_hooks(tokens, fwd_hooks=[(NAME, hook_of(add_everywhere))])
        handle.remove()
    assert len(results) == 1


def test_temporary_hooks_are_not_removed_by_another_thread(make_model):
    """Nor left behind, although TransformerLens counts the contexts of all threads together."""
    model, sae, tokens = make_model("hooked-gpt2"), route_sae(ROUTED), some_tokens()
    clean, expected = run(model, tokens), edited(model, sae, tokens)
    hooks = [(NAME, hook_of(add_everywhere))]
    with attach(model, sae):
        entered = threading.Barrier(2)

        def other():
            with model.hooks(fwd_hooks=hooks):
                entered.wait(60)
                entered.wait(60)  # the first context has ended
                logits = run(model, tokens)
            return logits, run(model, tokens)

        with ThreadPoolExecutor(1) as pool:
            context = model.hooks(fwd_hooks=hooks)
            context.__enter__()
            future = pool.submit(torch.no_grad()(other))
            entered.wait(60)
            context.__exit__(None, None, None)
            point = model.hook_dict[NAME]
            mine = [h for h in point.fwd_hooks if vars(h)["thread"] == threading.get_ident()]
            for handle in mine:  # its level was counted too low: what one user would see
                handle.hook.remove()
                point.fwd_hooks.remove(handle)
            entered.wait(60)
            spliced, after = future.result(timeout=60)
        close(spliced, expected)
        assert torch.equal(after, clean)


def test_hooks_that_another_thread_reset_are_missed(make_model):
    model, sae, tokens = make_model("proxy-llama"), route_sae(ROUTED), some_tokens()
    with attach(model, sae), model.hooks(fwd_hooks=[(NAME, hook_of(add_everywhere))]):
        in_a_thread(model.reset_hooks)
        with pytest.raises(RuntimeError, match="another thread removed"):
            run(model, tokens)


@pytest.mark.parametrize("kind", WITH_SAES)
def test_an_sae_belongs_to_its_thread(make_model, kind):
    model, sae, tokens = make_model(kind), route_sae(ROUTED), some_tokens()
    clean = run(model, tokens)
    with attach(model, sae):
        with model.saes([sae]):
            with_sae = run(model, tokens)
            with pytest.raises(RuntimeError, match="an SAE that another thread added"):
                in_a_thread(run, model, tokens)
            in_a_thread(model.reset_saes)
            with pytest.raises(RuntimeError, match="another thread replaced the SAE"):
                run(model, tokens)
            model.add_sae(sae)
        assert not torch.equal(with_sae, clean)
        close(in_a_thread(lambda: model.run_with_saes(tokens, saes=[sae])), with_sae)
        assert torch.equal(run(model, tokens), clean)


@pytest.mark.parametrize("kind", WITH_SAES)
def test_hooks_are_missed_that_an_sae_of_another_thread_pushed_out(make_model, kind):
    model, sae, tokens = make_model(kind), route_sae(ROUTED), some_tokens()

    def reset(value, hook):
        raise AssertionError("not at the hook point any more")

    def splice():
        with model.saes([sae]):
            pass

    with attach(model, sae):
        point = model.hook_dict[NAME]
        point.add_hook(reset, level=1)
        in_a_thread(splice)
        with pytest.raises(RuntimeError, match="another thread removed"):
            run(model, tokens)
        with pytest.raises(RuntimeError, match="an SAE took the place"):
            point.add_hook(reset)


def test_a_mask_of_tokens_is_not_shared(make_model):
    """SAELens keeps the excluded tokens of the latest call only."""
    model, sae, tokens = make_model("hooked-llama"), route_sae(ROUTED), some_tokens()
    with attach(model, sae):
        model.add_sae(sae, exclude_special_tokens=[int(tokens[0, 0])])
        handle, _ = within_block(model, 5, lambda: model(tokens, stop_at_layer=1))
        model(tokens)
        handle.remove()
        handle, _ = within_block(model, 0, lambda: model(tokens, stop_at_layer=1))
        with pytest.raises(RuntimeError, match="one mask of tokens only"):
            model(tokens)
        handle.remove()
        model.reset_saes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [0, 1, 3, 4, 6])
def test_attaching_while_another_thread_is_in_a_pass(make_model, kind, block):
    """The pass is read from its first routed block on, left alone, or refused."""
    model, sae, tokens = make_model(kind), route_sae(ROUTED), some_tokens()
    clean, attached = run(model, tokens), []

    def attach_there(module, args, output):
        attached.append(in_a_thread(attach, model, sae))

    handle = decoder_blocks(model)[block].register_forward_hook(attach_there)
    try:
        if 1 <= block < 4:
            with pytest.raises(RuntimeError, match="began before attach"):
                run(model, tokens)
        else:
            assert torch.equal(run(model, tokens), clean)
    finally:
        handle.remove()
        with attached[0]:
            assert torch.equal(run(model, tokens), clean)


@pytest.mark.parametrize("name", ["blocks.4.hook_resid_route"])
def test_at_an_earlier_name_one_thread_runs(make_model, name):
    model, sae, tokens = make_model("hooked-llama"), route_sae(ROUTED), some_tokens()
    sae.cfg.metadata.hook_name = name
    with attach(model, sae):
        run(model, tokens)
        with pytest.raises(RuntimeError, match="one thread only"):
            in_a_thread(run, model, tokens)


def test_given_routes_belong_to_their_thread():
    sae = route_sae(ROUTED, routing="uniform")
    x = torch.randn(2, 5, 3, 32, generator=torch.Generator().manual_seed(0)).double()
    routes = torch.zeros(2, 5, dtype=torch.long)
    with with_routes(sae, routes):
        assert torch.equal(sae.route(x).route, routes)
        assert in_a_thread(sae.route, x).route.any()
        assert torch.equal(sae.route(x).route, routes)


def test_stress(tmp_path):
    """A small run of the script that counts: nothing is wrong, and something of each is right."""
    spec = importlib.util.spec_from_file_location("hook_stress", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    sys.modules["hook_stress"] = script
    spec.loader.exec_module(script)
    output = tmp_path / "result.json"
    assert script.main(["--n", "24", "--output", str(output)]) == 0
    assert output.exists()
    counts = script.stress(6, seed=1)
    rows = script.summary(counts)
    assert all(row["WRONG"] == 0 and row["right"] > 0 for row in rows.values())
    assert rows["shared"]["refused"] == 0 and rows["early"]["refused"] > 0
