"""Units of activations: what a feature contributes to n(x), token by token."""

from itertools import product

import pytest
import torch
from support.architectures import every_architecture, random_sae, random_streams
from support.crosscoders import crosscoder

from sae_lens_route.errors import UserError
from sae_lens_route.saes.inference import to_inference
from sae_lens_route.saes.units import activation_unit, in_units, is_scaled, require_units

pytestmark = pytest.mark.usefixtures("no_gradients")


def read(sae):
    """Routing and activations of 3 x 10 tokens."""
    routing = sae.route(random_streams(30).view(3, 10, 3, 6))
    return routing, sae.encode(routing.x_route)


@every_architecture
def test_activations_over_p_are_contributions_to_n(architecture):
    sae = to_inference(random_sae(architecture))
    routing, z = read(sae)
    acts = in_units(z, routing, sae)
    for at in product(range(3), range(10)):
        of_n = sum(float(act) * row for act, row in zip(acts[at], sae.W_dec, strict=True))
        expected = (sae.decode(z)[at] - sae.b_dec) / routing.probs[at].max()
        torch.testing.assert_close(of_n, expected, rtol=1e-9, atol=1e-9)
    assert routing.weight.std() > 0.05 and (z > 0).any()
    torch.testing.assert_close(in_units(z[..., [3, 1]], routing, sae), acts[..., [3, 1]])
    assert torch.equal(in_units(z.to_sparse(), routing, sae), acts)
    assert in_units(z, routing, sae, "x_route") is z


@pytest.mark.parametrize(
    "options", [{"routing": "soft"}, {"routing": "uniform"}, {"router_objective": "assignment"}]
)
def test_units_are_the_same_where_p_does_not_scale(options):
    sae = to_inference(random_sae("topk", **options))
    routing, z = read(sae)
    assert not is_scaled(sae)
    assert in_units(z, routing, sae) is z and activation_unit(routing, sae) is None


def test_a_crosscoder_has_no_p():
    assert not is_scaled(crosscoder("topk"))


def test_a_name_that_is_no_unit():
    with pytest.raises(UserError, match=r"units='n': must be one of n\(x\), x_route"):
        require_units("n")
