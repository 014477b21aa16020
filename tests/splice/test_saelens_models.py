"""SAELens's own models attach and detach RouteSAEs by themselves."""

import logging

import pytest
import torch
from sae_lens import HookedSAETransformer, StandardSAE, StandardSAEConfig
from sae_lens.analysis.compat import has_transformer_bridge
from sae_lens.saes.sae import SAEMetadata
from support.splice import hooked_model, route_sae, some_tokens

from sae_lens_route.errors import UserError
from sae_lens_route.splice import RouteSAETransformer, attach
from sae_lens_route.splice.model_calls import ModelCalls

pytestmark = pytest.mark.usefixtures("no_gradients")

ROUTED = [2, 3, 5]
NAME = "blocks.5.route.hook_resid_post"
KINDS = ["HookedSAETransformer", "RouteSAETransformer"] + (
    ["SAETransformerBridge"] if has_transformer_bridge() else []
)


@pytest.fixture(params=KINDS)
def model(request, make_model):
    if request.param == "SAETransformerBridge":
        return make_model("bridge-llama")
    classes = {"HookedSAETransformer": HookedSAETransformer}
    return hooked_model("llama", classes.get(request.param, RouteSAETransformer))


def test_a_model_attaches_by_itself(model):
    sae, other, tokens = route_sae(ROUTED), route_sae(ROUTED, seed=1), some_tokens()
    clean, hook_dict = model(tokens), list(model.hook_dict)
    was_watched = ModelCalls.watches(model)

    def logits_with(sae):
        with attach(model, sae):
            return model.run_with_saes(tokens, saes=[sae])

    expected, expected_other = logits_with(sae), logits_with(other)
    assert not torch.equal(expected, clean) and not torch.equal(expected, expected_other)

    assert torch.equal(model.run_with_saes(tokens, saes=[sae]), expected)
    assert torch.equal(model.run_with_saes(tokens, saes=sae), expected)
    assert list(model.hook_dict) == hook_dict
    _, cache = model.run_with_cache_with_saes(tokens, saes=[sae])
    assert f"{NAME}.hook_sae_acts_post" in cache
    with model.saes([sae]):
        assert torch.equal(model(tokens), expected)
        assert torch.equal(model.run_with_saes(tokens, saes=[other]), expected_other)
        assert torch.equal(model(tokens), expected)  # the first one is back, with its router
    assert torch.equal(model(tokens), clean)
    assert list(model.hook_dict) == hook_dict

    model.add_sae(sae)
    model.add_sae(other)
    assert torch.equal(model(tokens), expected_other)
    model.reset_saes()
    assert torch.equal(model(tokens), clean)
    assert list(model.hook_dict) == hook_dict
    assert ModelCalls.watches(model) == was_watched


def test_an_sae_attached_by_hand_stays(model):
    sae, other, tokens = route_sae(ROUTED), route_sae(ROUTED, seed=1), some_tokens()
    hook_dict, scaled = list(model.hook_dict), model.run_with_saes(tokens, saes=[sae])
    with attach(model, sae, unscaled=True) as handle:
        assert not torch.equal(model.run_with_saes(tokens, saes=[sae]), scaled)
        assert model.hook_dict[NAME] is handle.hook_point
        with pytest.raises(UserError, match="attached already"):
            model.add_sae(other)
    assert list(model.hook_dict) == hook_dict


def test_an_ordinary_sae_goes_to_saelens_as_ever(model, caplog):
    name = "blocks.3.hook_out" if "Bridge" in type(model).__name__ else "blocks.3.hook_resid_post"
    metadata = SAEMetadata(hook_name=name)
    plain = StandardSAE(StandardSAEConfig(d_in=route_sae(ROUTED).cfg.d_in, d_sae=8))
    plain.cfg.metadata = metadata
    tokens = some_tokens()
    clean = model(tokens)
    with model.saes([plain, route_sae(ROUTED)]):
        assert set(model.acts_to_saes) == {name, NAME}
    assert not model.acts_to_saes and torch.equal(model(tokens), clean)
    metadata.hook_name = "blocks.3.no_such_hook"
    sae_lens = logging.getLogger("sae_lens")
    sae_lens.addHandler(caplog.handler)
    model.add_sae(plain)
    sae_lens.removeHandler(caplog.handler)
    assert "No hook found" in caplog.text


def test_what_does_not_fit_is_refused_and_leaves_nothing(model):
    sae = route_sae([2, 3, 5])
    sae.cfg.metadata.routed_blocks = [2, 3, 50]
    hook_dict = list(model.hook_dict)
    with pytest.raises(UserError, match="blocks"):
        model.run_with_saes(some_tokens(), saes=[sae])
    assert list(model.hook_dict) == hook_dict and not model.acts_to_saes
