"""`RouteSAETransformer` attaches and detaches by itself."""

import pytest
import torch
from support.splice import (
    hooked_model,
    route_sae,
    some_tokens,
)

from sae_lens_route.splice import RouteSAETransformer, attach

pytestmark = pytest.mark.usefixtures("no_gradients")

ROUTED = [2, 3, 5]
NAME = "blocks.5.route.hook_resid_post"


def test_route_sae_transformer_attaches_by_itself():
    model = hooked_model("llama", RouteSAETransformer)
    sae, other, tokens = route_sae(ROUTED), route_sae(ROUTED, seed=1), some_tokens()
    clean, hook_dict = model(tokens), list(model.hook_dict)

    def logits_with(sae):
        with attach(plain, sae):
            return plain.run_with_saes(tokens, saes=[sae])

    plain = hooked_model("llama")
    expected, expected_other = logits_with(sae), logits_with(other)

    assert torch.equal(model.run_with_saes(tokens, saes=[sae]), expected)
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

    with attach(model, sae, unscaled=True) as handle:  # by hand: stays, with its option
        unscaled = model.run_with_saes(tokens, saes=[sae])
        assert model.hook_dict[NAME] is handle.hook_point
        assert not torch.equal(unscaled, expected)
        with pytest.raises(ValueError, match="attached already"):
            model.add_sae(other)
    assert list(model.hook_dict) == hook_dict
