"""Reconstruction and routing metrics against brute force and the reference's numbers."""

import json
import math

import pytest
import torch
from support.small import tokens_dataset

from sae_lens_route.data.reading import activation_batches, kept_activations
from sae_lens_route.errors import UserError
from sae_lens_route.evals.evaluate import evaluate
from sae_lens_route.evals.reconstruction import CrosscoderSums, reconstruction_metrics
from sae_lens_route.records import plain, typed

BLOCKS = list(range(3, 12))


def test_the_references_norm_mse(lm_golden):
    _, sae, tensors, info = lm_golden
    x = tensors["hidden_states_blocks3_11"].flatten(0, 1)
    result = reconstruction_metrics(sae, [x])
    assert result.norm_mse == pytest.approx(info["reference_metrics"]["NormMSE"], rel=5e-4)


@torch.no_grad()
def test_against_brute_force(route_sae):
    """Token by token, block by block, and split into batches in another way."""
    x = torch.randn(40, 9, 64, generator=torch.Generator().manual_seed(0))
    result = reconstruction_metrics(route_sae, x.split(7))
    routed, table, routes = [], [], []
    for token in x:
        r = route_sae.route(token)
        n = [(h - h.mean()) / (h.std() + 1e-6) for h in token]
        row = []
        for i in range(9):
            target = r.weight * n[i]
            row.append(float(((target - route_sae(target)) ** 2).sum() / (target**2).sum()))
        table.append(row)
        routed.append(row[int(r.route)])
        routes.append(int(r.route))
    own = torch.tensor(routed)[::4]  # one token in four is compared
    table = torch.tensor(table)[::4]
    share = torch.bincount(torch.tensor(routes), minlength=9) / 40

    def by_block(values):
        return dict(zip(BLOCKS, values.tolist(), strict=True))

    assert result.n_tokens == 40
    assert result.norm_mse == pytest.approx(sum(routed) / 40, rel=1e-4)
    assert result.share_by_block == pytest.approx(by_block(share))
    assert result.norm_mse_fixed_block == pytest.approx(by_block(table.mean(0)), rel=1e-4)
    assert result.norm_mse_uniform == pytest.approx(float(table.mean()), rel=1e-4)
    assert result.norm_mse_matched == pytest.approx(float(share @ table.mean(0)), rel=1e-4)
    assert result.norm_mse_best == pytest.approx(float(table.min(1).values.mean()), rel=1e-4)
    assert result.regret == pytest.approx(float(own.mean()) - result.norm_mse_best, abs=1e-6)
    assert 0 <= result.load_entropy <= math.log(9)
    probs = torch.stack([route_sae.route(token).probs for token in x]).mean(0)
    assert result.mean_probs_by_block == pytest.approx(by_block(probs), rel=1e-4)
    for i, block in enumerate(BLOCKS):
        here = [e for e, route in zip(routed, routes, strict=True) if route == i]
        if here:
            assert result.norm_mse_by_block[block] == pytest.approx(sum(here) / len(here), rel=1e-4)
        else:
            assert result.norm_mse_by_block[block] is None


@pytest.mark.parametrize("n", [1, 2, 7, 300])
def test_equal_tokens_have_no_variance_to_explain(route_sae, crosscoder, n):
    x = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(0)).expand(n, 9, 64)
    result = reconstruction_metrics(route_sae, x.split(50))
    sums = CrosscoderSums(crosscoder)
    sums.add(x[:, :3])
    assert sums.metrics().explained_variance is result.explained_variance is None
    assert typed(type(result), json.loads(json.dumps(plain(result)))) == result
    assert math.isfinite(result.norm_mse)


def test_no_tokens_is_an_error(route_sae):
    with pytest.raises(UserError, match="no tokens to evaluate"):
        reconstruction_metrics(route_sae, [])


def test_dead_features_of_a_crosscoder_are_those_no_token_fires(tinyllama, crosscoder):
    size = {"max_tokens": 64, "batch_size": 4}
    result = evaluate(tinyllama, crosscoder, tokens_dataset(8), **size)
    batches = activation_batches(tinyllama, crosscoder, tokens_dataset(8), **size)
    (x,) = kept_activations(batches, crosscoder)
    fired = (crosscoder.encode_layers(x) > 0).any(0)
    assert result.reconstruction.dead_features == int((~fired).sum()) > 0
