"""Routing without p, and what `b_dec` is set to before the first step."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from support.architectures import a_step, every_architecture, random_sae, random_streams

from sae_lens_route.errors import UserError
from sae_lens_route.saes.inference import to_inference
from sae_lens_route.saes.routed import geometric_median
from sae_lens_route.saes.router import normalize, pick_route


def first_step(x):
    return replace(a_step(x), n_training_steps=0)


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


@every_architecture
def test_b_dec_is_set_to_the_mean_before_the_first_step_only(architecture):
    sae = random_sae(architecture, b_dec_init="mean")
    x, before = random_streams(9), sae.b_dec.detach().clone()
    sae.training_forward_pass(a_step(x))
    assert torch.equal(sae.b_dec, before)
    sae.training_forward_pass(first_step(x))
    expected = sae.route(x).x_route.detach().numpy().mean(0)
    np.testing.assert_allclose(sae.b_dec.detach().numpy(), expected, rtol=1e-12)
    assert sae.b_dec.requires_grad


def test_by_default_b_dec_is_left_as_it_is():
    sae = random_sae("topk")
    before = sae.b_dec.detach().clone()
    sae.training_forward_pass(first_step(random_streams(9)))
    assert torch.equal(sae.b_dec, before)


def test_geometric_median_against_scipy():
    """Weiszfeld's 50 iterations end within 1e-4 of a general minimizer, on skewed points."""
    x = random_streams(40)[:, 0].exp()
    sae = random_sae("topk", b_dec_init="geometric_median", n_layers=1)
    sae.training_forward_pass(first_step(x.unsqueeze(1)))
    rows = normalize(x)
    torch.testing.assert_close(sae.b_dec.detach(), geometric_median(rows), rtol=1e-12, atol=1e-12)
    for points in (x, rows):

        def mean_distance(center, points=points):
            return np.linalg.norm(points.numpy() - center, axis=1).sum()

        found = minimize(mean_distance, np.zeros(points.shape[1]), options={"gtol": 1e-9})
        np.testing.assert_allclose(geometric_median(points).numpy(), found.x, atol=1e-4)
