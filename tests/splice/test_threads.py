"""Several threads on one attached model: right or refused, and a refusal changes nothing."""

import copy
import json
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
    hooked_model,
    route_sae,
    run,
    some_tokens,
)

from sae_lens_route.errors import UserError
from sae_lens_route.models.kinds import block_loop, decoder_blocks
from sae_lens_route.saes.routed import with_routes
from sae_lens_route.splice import RouteSAETransformer, attach

pytestmark = pytest.mark.usefixtures("no_gradients")

ROUTED = [1, 2, 4]
NAME = "blocks.4.route.hook_resid_post"
WITH_SAES = [kind for kind in KINDS if not kind.startswith("proxy")]
BRIDGES = [kind for kind in KINDS if kind.startswith("bridge")]
SCRIPTS = Path(__file__).parents[2] / "benchmarks" / "reliability"
EDIT = (NAME, hook_of(add_everywhere))


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


# --- what all threads share ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", WITH_SAES)
def test_an_sae_that_was_added_is_for_all_threads(make_model, kind):
    model, sae, tokens = make_model(kind), route_sae(ROUTED), some_tokens()
    with attach(model, sae):
        with_sae = model.run_with_saes(tokens, saes=[sae])
        model.add_sae(sae)
        handle, results = within_block(model, 3, lambda: run(model, tokens))
        assert torch.equal(run(model, tokens), with_sae)
        handle.remove()
        assert len(results) == 2 and all(torch.equal(logits, with_sae) for logits in results)


def test_a_name_in_the_block_itself_is_for_all_threads(make_model):
    model, sae, tokens = make_model("hooked-llama"), route_sae(ROUTED), some_tokens()
    sae.cfg.metadata.hook_name = name = "blocks.4.hook_resid_route"
    expected = edited(model, sae, tokens)
    with attach(model, sae):
        model.add_hook(name, EDIT[1])
        close(in_a_thread(run, model, tokens), expected)


@pytest.mark.parametrize("option", ["exclude_special_tokens", "use_error_term"])
def test_what_saelens_keeps_once_is_refused_in_overlapping_passes(make_model, option):
    """One mask of tokens; the hooks of the SAE, which are off while its error is computed."""
    model, sae, tokens = make_model("hooked-llama"), route_sae(ROUTED), some_tokens()
    value = [int(tokens[0, 0])] if option == "exclude_special_tokens" else True
    with attach(model, sae):
        model.add_sae(sae, **{option: value})
        handle, results = within_block(model, 5, lambda: model(tokens, stop_at_layer=1))
        model(tokens)  # overlaps after the hook point
        handle.remove()
        handle, results = within_block(model, 0, lambda: model(tokens, stop_at_layer=1))
        with pytest.raises(UserError, match="Run one pass at a time"):
            model(tokens)
        handle.remove()
        assert len(results) == 1


# --- changes of the model ------------------------------------------------------------------------


def use_hooks(model, tokens):
    with model.hooks(fwd_hooks=[EDIT]):
        return run(model, tokens)


def use_saes(model, sae, tokens):
    with model.saes([sae]):
        return run(model, tokens)


def changes(model, sae, tokens):
    """What a thread may do with a model that needs it alone."""
    hooks = [
        lambda: model.run_with_hooks(tokens, fwd_hooks=[EDIT]),
        lambda: model.run_with_hooks(tokens, fwd_hooks=[(lambda name: name == NAME, EDIT[1])]),
        lambda: model.run_with_cache(tokens, names_filter=[NAME]),
        lambda: use_hooks(model, tokens),
        lambda: model.add_hook(*EDIT),
        lambda: model.add_perma_hook(*EDIT),
        lambda: model.reset_hooks(including_permanent=True),
        lambda: attach(model, route_sae([5, 6])),
    ]
    saes = [
        lambda: model.run_with_saes(tokens, saes=[sae]),
        lambda: model.run_with_cache_with_saes(tokens, saes=[sae]),
        lambda: use_saes(model, sae, tokens),
        lambda: model.add_sae(sae),
        lambda: model.reset_saes(),
    ]
    return [*hooks, *(saes if hasattr(model, "add_sae") else [])]


def all_are_refused(work, match):
    for each in work:
        with pytest.raises(UserError, match=match):
            in_a_thread(each)
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_changes_are_refused_while_another_thread_is_in_a_pass(make_model, kind):
    """The pass has edits at the hook, and none of the refused calls has an effect on it."""
    model, sae, tokens = make_model(kind), route_sae(ROUTED), some_tokens()
    expected = edited(model, sae, tokens)
    with attach(model, sae):
        names = list(model.hook_dict)
        model.add_hook(*EDIT)
        results = []

        def refuse(module, args):
            work = changes(model, sae, tokens)
            results.append(all_are_refused(work, "began during another thread's pass"))

        handle = decoder_blocks(model)[3].register_forward_pre_hook(refuse)
        close(run(model, tokens), expected)
        handle.remove()
        assert results == [True, True]  # in the clean half and in the replay
        assert list(model.hook_dict) == names
        close(run(model, tokens), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mine", ["hooks", "saes"])
def test_a_change_has_the_model_alone(make_model, kind, mine):
    """On a bridge, SAELens would skip the edits of other threads, or leave their SAE behind."""
    model, sae, tokens = make_model(kind), route_sae(ROUTED), some_tokens()
    if mine == "saes" and kind not in WITH_SAES:
        return
    clean, expected = run(model, tokens), edited(model, sae, tokens)
    with attach(model, sae):
        if mine == "saes":
            expected = model.run_with_saes(tokens, saes=[sae])
        work = [*changes(model, sae, tokens), lambda: run(model, tokens)]
        with model.hooks(fwd_hooks=[EDIT]) if mine == "hooks" else model.saes([sae]):
            close(run(model, tokens), expected)
            assert all_are_refused(work, rf"began during another thread's model.{mine}\(\)")
            close(run(model, tokens), expected)
        for _ in range(2):
            assert torch.equal(run(model, tokens), clean)
            assert torch.equal(in_a_thread(run, model, tokens), clean)
            close(in_a_thread(use_hooks, model, tokens), edited(model, sae, tokens))


@pytest.mark.parametrize("kind", BRIDGES)
def test_a_bridge_that_stops_early_does_so_for_all_threads(make_model, kind):
    """It notes on its blocks where to stop: the other pass would return a residual stream."""
    model, sae, tokens = make_model(kind), route_sae(ROUTED), some_tokens()
    streams = model(tokens, stop_at_layer=3)
    with attach(model, sae):

        def refuse(module, args):
            all_are_refused(
                [lambda: run(model, tokens)], "another thread's pass with stop_at_layer"
            )
            refused.append(True)

        refused = []
        handle = decoder_blocks(model)[0].register_forward_pre_hook(refuse)
        assert torch.equal(model(tokens, stop_at_layer=3), streams)
        handle.remove()
    assert refused == [True]


def test_blocks_called_one_by_one_are_a_pass_once_the_hook_point_runs(make_model):
    model, sae, tokens = make_model("hooked-gpt2"), route_sae(ROUTED), some_tokens()
    expected, refused = edited(model, sae, tokens), []

    def edit(value, hook):
        work = changes(model, sae, tokens)
        refused.append(all_are_refused(work, "began during another thread's pass"))
        return add_everywhere(value)

    def by_hand():
        x = model(tokens, stop_at_layer=0)
        for block in model.blocks:
            x = block(x)
        return model(x, start_at_layer=len(model.blocks))

    with attach(model, sae):
        model.add_hook(NAME, edit)
        close(by_hand(), expected)
        assert refused
        model.reset_hooks()
        with model.hooks(fwd_hooks=[EDIT]):
            assert all_are_refused([by_hand], "another thread's model.hooks")


@pytest.mark.parametrize("kind", KINDS)
def test_removing_is_never_refused_but_what_others_do_is(make_model, kind):
    model, sae, tokens = make_model(kind), route_sae(ROUTED), some_tokens()
    clean, forward = run(model, tokens), block_loop(model).forward
    handle = attach(model, sae)
    with pytest.raises(UserError, match="another thread removed"), model.hooks(fwd_hooks=[EDIT]):
        in_a_thread(handle.remove)
        with pytest.raises(UserError, match="another thread removed"):
            run(model, tokens)
    assert torch.equal(run(model, tokens), clean)
    assert block_loop(model).forward == forward


def test_hooks_that_change_within_a_pass_are_refused(make_model):
    """Added at the hook point itself, without a method of the model that could be refused."""
    model, sae, tokens = make_model("hooked-gpt2"), route_sae(ROUTED), some_tokens()
    with attach(model, sae):
        point = model.hook_dict[NAME]
        point.add_hook(EDIT[1])
        handle, _ = within_block(model, 4, lambda: point.add_hook(EDIT[1]))
        with pytest.raises(RuntimeError, match="changed within a pass"):
            run(model, tokens)
        handle.remove()


@pytest.mark.parametrize("kind", WITH_SAES)
def test_a_hook_is_refused_where_an_sae_is(make_model, kind):
    """A bridge would skip it without a word."""
    model, sae, tokens = make_model(kind), route_sae(ROUTED), some_tokens()
    with attach(model, sae):
        model.add_sae(sae)
        for work in changes(model, sae, tokens)[0], lambda: use_hooks(model, tokens):
            with pytest.raises(UserError, match="an SAE is at"):
                work()
        inside = (f"{NAME}.hook_sae_input", EDIT[1])
        assert not torch.equal(model.run_with_hooks(tokens, fwd_hooks=[inside]), model(tokens))


def test_a_route_sae_transformer_takes_turns_before_anything_is_attached():
    model, sae, tokens = (
        hooked_model("llama", RouteSAETransformer),
        route_sae(ROUTED),
        some_tokens(),
    )
    clean, with_sae = model(tokens), model.run_with_saes(tokens, saes=[sae])
    work = [lambda: model.run_with_saes(tokens, saes=[route_sae(ROUTED, seed=1)])]
    with model.saes([sae]):
        assert all_are_refused(work, "model.saes")
        assert torch.equal(model(tokens), with_sae)
    assert torch.equal(model(tokens), clean)
    assert torch.equal(in_a_thread(lambda: model.run_with_saes(tokens, saes=[sae])), with_sae)


def test_a_copy_of_a_model_is_in_no_call(make_model):
    model, sae, tokens = copy.deepcopy(make_model("hooked-gpt2")), route_sae(ROUTED), some_tokens()
    clean = model(tokens)
    with (
        attach(model, sae),
        model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook: x)]),
    ):
        other = copy.deepcopy(model)
        assert torch.equal(in_a_thread(run, other, tokens), clean)


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


def test_given_routes_belong_to_their_thread():
    sae = route_sae(ROUTED, routing="uniform")
    x = torch.randn(2, 5, 3, 32, generator=torch.Generator().manual_seed(0)).double()
    routes = torch.zeros(2, 5, dtype=torch.long)
    with with_routes(sae, routes):
        assert torch.equal(sae.route(x).route, routes)
        assert in_a_thread(sae.route, x).route.any()
        assert torch.equal(sae.route(x).route, routes)


def test_stress(tmp_path, monkeypatch):
    """A small run of the script that counts: nothing is wrong, and something of each is right."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import hook_stress

    output = tmp_path / "result.json"
    assert hook_stress.main(["--n", "12", "--output", str(output)]) == 0
    rows = json.loads(output.read_text())["families"]
    assert list(rows) == ["early", "order", "shared", "turns", "threads"]
    assert all(row["WRONG"] == 0 and row["right"] > 0 for row in rows.values())
    assert rows["shared"]["refused"] == rows["turns"]["refused"] == 0
    assert rows["early"]["refused"] > 0 and rows["threads"]["refused"] > 0
