"""What `b_dec` is set to before the first step."""

from dataclasses import replace

import numpy as np
import torch
from scipy.optimize import minimize
from support.architectures import a_step, every_architecture, random_sae, random_streams

from sae_lens_route.saes.crosscoder import (
    TopKTrainingCrosscoder,
    TopKTrainingCrosscoderConfig,
    TrainingCrosscoder,
    TrainingCrosscoderConfig,
)
from sae_lens_route.saes.decoder_bias import geometric_median
from sae_lens_route.saes.router import normalize


def first_step(x):
    return replace(a_step(x), n_training_steps=0)


@every_architecture
def test_b_dec_is_set_to_the_mean_before_the_first_step_only(architecture):
    sae = random_sae(architecture)
    x, before = random_streams(9), sae.b_dec.detach().clone()
    sae.training_forward_pass(a_step(x))
    assert torch.equal(sae.b_dec, before)
    sae.training_forward_pass(first_step(x))
    expected = sae.route(x).x_route.detach().numpy().mean(0)
    np.testing.assert_allclose(sae.b_dec.detach().numpy(), expected, rtol=1e-12)
    assert sae.b_dec.requires_grad


def test_with_zeros_b_dec_is_left_as_it_is():
    sae = random_sae("topk", b_dec_init="zeros")
    before = sae.b_dec.detach().clone()
    sae.training_forward_pass(first_step(random_streams(9)))
    assert torch.equal(sae.b_dec, before)


def _crosscoder(cls, config, **fields):
    sizes = {"d_in": 12, "d_sae": 8, "n_routed_layers": 3, "dtype": "float64"}
    return cls(config(**sizes, **fields))


def test_a_crosscoder_that_subtracts_b_dec_starts_it_at_the_mean():
    x = torch.randn(9, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = normalize(x).flatten(1).numpy().mean(0)
    with_topk = _crosscoder(TopKTrainingCrosscoder, TopKTrainingCrosscoderConfig, k=2)
    with_topk.training_forward_pass(first_step(x))
    np.testing.assert_allclose(with_topk.b_dec.detach().numpy(), expected, rtol=1e-12)
    with_relu = _crosscoder(TrainingCrosscoder, TrainingCrosscoderConfig)
    with_relu.training_forward_pass(first_step(x))
    assert torch.equal(with_relu.b_dec, torch.zeros(12).double())
    asked = _crosscoder(TrainingCrosscoder, TrainingCrosscoderConfig, b_dec_init="mean")
    asked.training_forward_pass(first_step(x))
    np.testing.assert_allclose(asked.b_dec.detach().numpy(), expected, rtol=1e-12)


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
