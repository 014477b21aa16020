"""Routing without p."""

import pytest
import torch
from support.architectures import every_architecture, random_sae, random_streams

from sae_lens_route.errors import UserError
from sae_lens_route.saes.inference import to_inference
from sae_lens_route.saes.router import normalize, pick_route


@every_architecture
def test_the_assignment_objective_routes_without_p(architecture):
    sae = random_sae(architecture, router_objective="assignment")
    x = random_streams(9)
    routing, scaled = sae.route(x), random_sae(architecture).route(x)
    assert torch.equal(routing.route, scaled.route) and torch.equal(routing.probs, scaled.probs)
    assert torch.equal(routing.weight, torch.ones_like(routing.weight))
    torch.testing.assert_close(
        routing.x_route, normalize(pick_route(x, routing.route)), rtol=1e-12, atol=1e-12
    )
    saved = to_inference(sae)
    assert saved.cfg.scale_by_probability is False
    assert torch.equal(saved.route(x).x_route, routing.x_route)


def test_every_other_objective_scales_unless_told_otherwise():
    x = random_streams(9)
    for objective in ("reconstruction", "frozen"):
        routing = random_sae("topk", router_objective=objective).route(x)
        assert torch.equal(routing.weight, routing.probs.max(-1).values)
    frozen = random_sae("topk", router_objective="frozen", scale_by_probability=False)
    assert torch.equal(frozen.route(x).weight, torch.ones(9).double())


@pytest.mark.parametrize("options", [{}, {"routing": "soft", "router_objective": "frozen"}])
def test_a_router_that_learns_through_p_keeps_it(options):
    with pytest.raises(
        UserError, match=r"scale_by_probability=False.*router_objective='assignment'"
    ):
        random_sae("topk", scale_by_probability=False, **options)
