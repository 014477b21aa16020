"""Attaching and removing: the hook point's name, metadata, the model restored."""

import gc
import weakref

import pytest
import torch
from sae_lens.load_model import HookedProxyLM
from sae_lens.saes.sae import SAE
from support.splice import (
    KINDS,
    add_everywhere,
    brute_force,
    close,
    hook_of,
    hooks_on,
    route_sae,
    run,
    some_tokens,
)
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint

from sae_lens_route.splice import attach

pytestmark = pytest.mark.usefixtures("no_gradients")

ROUTED = [2, 3, 5]
NAME = "blocks.5.route.hook_resid_post"
OLD_NAME = "blocks.5.hook_resid_route"  # in files that were saved before 0.1.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [NAME, OLD_NAME])
def test_a_saved_sae_attaches_at_the_name_in_its_metadata(make_model, tmp_path, kind, name):
    model, sae, tokens = make_model(kind), route_sae(ROUTED), some_tokens()
    clean, before, hooks = run(model, tokens), list(model.hook_dict), hooks_on(model)
    expected, *_ = brute_force(model, sae, ROUTED, add_everywhere, lambda: run(model, tokens))
    assert (expected - clean).abs().max() > 0.1
    sae.cfg.metadata.hook_name = name
    sae.save_model(tmp_path)
    with attach(model, SAE.load_from_disk(tmp_path)) as handle:
        assert handle.name == name
        assert set(model.hook_dict) - set(before) == {name}
        logits = model.run_with_hooks(tokens, fwd_hooks=[(name, hook_of(add_everywhere))])
        close(logits, expected)
        _, cache = model.run_with_cache(tokens, names_filter=[name], stop_at_layer=6)
        assert torch.equal(cache[name], handle.routing.x_route)
    assert list(model.hook_dict) == before
    assert hooks_on(model) == hooks


def test_the_hook_point_lives_in_a_module_of_its_own(make_model):
    model = make_model("hooked-llama")
    with attach(model, route_sae(ROUTED)) as handle:
        assert model.blocks[5].route.hook_resid_post is handle.hook_point
        assert model.mod_dict["blocks.5.route"] is model.blocks[5].route
    assert not hasattr(model.blocks[5], "route")


@pytest.mark.parametrize("kind", KINDS)
def test_two_saes_on_separate_blocks(make_model, kind):
    model, tokens = make_model(kind), some_tokens()
    early, late = route_sae([1, 2]), route_sae([3, 4, 6], seed=1)
    hooks = [(f"blocks.{b}.route.hook_resid_post", hook_of(add_everywhere)) for b in (2, 6)]
    hook_dict = list(model.hook_dict)
    with attach(model, early):

        def with_the_early_edit():
            return model.run_with_hooks(tokens, fwd_hooks=hooks[:1])

        expected, *_ = brute_force(model, late, [3, 4, 6], add_everywhere, with_the_early_edit)
        with attach(model, late):
            close(model.run_with_hooks(tokens, fwd_hooks=hooks), expected)
        assert (with_the_early_edit() - expected).abs().max() > 0.1
    assert list(model.hook_dict) == hook_dict


@pytest.mark.parametrize("kind", KINDS)
def test_removing_restores_the_model(make_model, kind):
    model, sae, tokens = make_model(kind), route_sae(ROUTED), some_tokens()
    clean, hook_dict, hooks = run(model, tokens), list(model.hook_dict), hooks_on(model)
    mod_dict = list(getattr(model, "mod_dict", ()))
    with attach(model, sae) as handle:
        assert isinstance(model.hook_dict[NAME], HookPoint)
        assert model.hook_dict[NAME] is handle.hook_point
        with pytest.raises(ValueError, match="attached already"):
            attach(model, sae)
        model.run_with_hooks(tokens, fwd_hooks=[(NAME, hook_of(add_everywhere))])
        if not isinstance(model, HookedProxyLM):
            model.run_with_saes(tokens, saes=[sae])
            model.add_sae(sae)
        if isinstance(model, HookedTransformer):
            model(tokens, stop_at_layer=4)  # a pass that never gets to the hook
    assert list(model.hook_dict) == hook_dict
    assert list(getattr(model, "mod_dict", ())) == mod_dict
    assert hooks_on(model) == hooks
    assert torch.equal(run(model, tokens), clean)
    handle.remove()  # again: nothing happens
    assert model.hook_dict.get(NAME) is None


def test_removing_frees_memory(make_model):
    model, tokens = make_model("hooked-llama"), some_tokens()

    def use():
        handle = attach(model, route_sae(ROUTED))
        model.run_with_hooks(tokens, fwd_hooks=[(NAME, hook_of(add_everywhere))])
        handle.remove()
        return weakref.ref(handle), weakref.ref(handle.sae)

    def live_tensors():
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    use()
    before = live_tensors()
    references = [reference for _ in range(3) for reference in use()]
    assert live_tensors() <= before
    assert all(reference() is None for reference in references)


def test_metadata_that_does_not_fit(make_model):
    model = make_model("hooked-llama")
    for changes, message in [
        ({"hook_names": None}, "hook_names"),
        ({"hook_name": "blocks.3.route.hook_resid_post"}, "blocks.5."),
        ({"hook_names": ["blocks.2.hook_resid_pre"] * 3}, "after blocks"),
        ({"hook_names": [f"blocks.{b}.hook_resid_post" for b in (2, 5)]}, "n_routed_layers=3"),
        ({"hook_names": [f"blocks.{b}.hook_resid_post" for b in (5, 3, 2)]}, "in order"),
        ({"hook_names": [f"blocks.{b}.hook_resid_post" for b in (2, 3, 8)]}, "0 to 7"),
        ({"hook_name": None}, "hook_name=None"),
        ({"hook_name": "blocks.5.hook_resid_post"}, "taken by another part"),
        ({"hook_name": "blocks.5.attn.hook_resid_post"}, "taken by another part"),
        ({"hook_name": "blocks.5.route.deeper.hook_resid_post"}, "blocks.N.MODULE.NAME"),
        ({"hook_name": "blocks.5."}, "must be blocks.N.NAME"),
    ]:
        sae = route_sae(ROUTED)
        for field, value in changes.items():
            sae.cfg.metadata[field] = value
        with pytest.raises(ValueError, match=message):
            attach(model, sae)
    with pytest.raises(ValueError, match="width 16, the model has width 32"):
        attach(model, route_sae(ROUTED, d=16))
    with pytest.raises(TypeError, match="HookedProxyLM"):
        attach(make_model("proxy-llama").model, route_sae(ROUTED))
    assert NAME not in model.hook_dict


def test_names_of_another_kind_of_model(make_model):
    """An SAE trained on one kind runs on the others: names tell the blocks, not the library."""
    tokens, results = some_tokens(), []
    for names in ("blocks.{}.hook_resid_post", "blocks.{}.hook_out", "model.layers.{}"):
        sae = route_sae(ROUTED)
        sae.cfg.metadata.hook_names = [names.format(b) for b in ROUTED]
        with attach(make_model("proxy-llama"), sae):
            results.append(make_model("proxy-llama").run_with_cache(tokens)[1][NAME])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
