"""Matching and F1 against hand-made dictionaries, brute force, and chance."""

import itertools
import math

import pytest
import torch
from sae_lens.synthetic import mean_correlation_coefficient
from support.crosscoders import crosscoder

from sae_lens_route.synthetic.recovery import (
    FiringCounts,
    Matching,
    decoder_rows,
    depth_scores,
    match_latents,
    uniqueness,
)


def unit(rows):
    return torch.nn.functional.normalize(rows.double(), dim=-1)


def brute_force(rows, directions):
    """The largest sum of cosines over all one-to-one matchings."""
    cosines = (unit(directions) @ unit(rows).T).tolist()
    n_features, n_latents = len(cosines), len(cosines[0])
    if n_features <= n_latents:
        choices = itertools.permutations(range(n_latents), n_features)
        return max(sum(cosines[f][j] for f, j in enumerate(choice)) for choice in choices)
    choices = itertools.permutations(range(n_features), n_latents)
    return max(sum(cosines[f][j] for j, f in enumerate(choice)) for choice in choices)


@pytest.mark.parametrize(("n_features", "n_latents"), [(5, 5), (4, 6), (6, 4)])
def test_the_matching_is_the_best_of_all(n_features, n_latents):
    directions, rows = torch.randn(n_features, 3), torch.randn(n_latents, 3)
    matching = match_latents(rows, directions)
    assert float(matching.cosine.sum()) == pytest.approx(brute_force(rows, directions), abs=1e-5)
    taken = matching.latent[matching.latent >= 0].tolist()
    assert len(set(taken)) == len(taken) == min(n_features, n_latents)
    assert (matching.cosine[matching.latent < 0] == 0).all()
    largest = (unit(directions) @ unit(rows).T).amax(-1)
    torch.testing.assert_close(matching.largest.double(), largest, atol=1e-6, rtol=0)
    assert (matching.largest >= matching.cosine - 1e-6)[matching.latent >= 0].all()


def test_the_truth_scores_one_whatever_its_order_and_scale():
    directions = torch.randn(20, 16)
    order = torch.randperm(20)
    matching = match_latents(3 * directions[order], directions)
    assert matching.cosine.tolist() == pytest.approx([1] * 20)
    assert torch.equal(order[matching.latent], torch.arange(20))
    assert mean_correlation_coefficient(directions[order], directions) == pytest.approx(1)
    opposite = match_latents(-directions, directions)
    assert opposite.cosine.max() < 0.9  # SAELens's measure without signs is 1
    assert mean_correlation_coefficient(-directions, directions) == pytest.approx(1)


def test_random_rows_score_as_chance_says():
    directions, rows = torch.randn(64, 128), torch.randn(64, 128)
    matching = match_latents(rows, directions)
    # the largest of 64 cosines, each about normal with deviation 1 / sqrt(128)
    chance = math.sqrt(2 * math.log(64) / 128)
    assert 0.5 * chance < float(matching.cosine.mean()) < chance
    assert float(matching.largest.mean()) == pytest.approx(0.21, abs=0.02)
    counts = FiringCounts(matching)
    truth = torch.rand(2000, 64) < 0.1
    counts.add((torch.rand(2000, 64) < 0.1).float(), truth, truth)
    overall, _ = depth_scores(counts, torch.arange(64) % 4)
    assert overall.recovered == 0
    assert overall.f1_read == pytest.approx(0.1, abs=0.01)


def f1_by_hand(found, truth):
    hits = sum(a and b for a, b in zip(found, truth, strict=True))
    total = sum(found) + sum(truth)
    return 2 * hits / total if sum(truth) else None


def test_f1_over_batches_against_a_loop():
    latent = torch.tensor([2, 0, -1, 3])
    matching = Matching(latent, torch.tensor([0.9, 0.6, 0.0, 0.8]), torch.ones(4))
    acts = torch.rand(90, 5) * (torch.rand(90, 5) < 0.4)
    fires = torch.rand(90, 4) < 0.5
    read = fires & (torch.rand(90, 4) < 0.6)
    read[:, 3] = False  # never active where the dictionary reads
    counts = FiringCounts(matching)
    for part in (slice(0, 40), slice(40, 90)):
        counts.add(acts[part], read[part], fires[part])
    found = [(acts[:, j] > 0).tolist() if j >= 0 else [False] * 90 for j in latent.tolist()]
    expected_read, expected = (
        [f1_by_hand(found[f], truth[:, f].tolist()) for f in range(4)] for truth in (read, fires)
    )
    assert expected_read[3] is None and expected[2] == 0
    f1_read, f1_anywhere = counts.f1()
    assert f1_read[:3].tolist() == pytest.approx(expected_read[:3])
    assert f1_read[3].isnan()
    assert f1_anywhere.tolist() == pytest.approx(expected)
    overall, by_depth = depth_scores(counts, torch.tensor([0, 1, 2, 3]))
    assert overall.f1_read == pytest.approx(sum(expected_read[:3]) / 3)
    assert overall.recovered == 0.5 and overall.n_features == 4
    assert (by_depth["late"].f1_anywhere, by_depth["late"].recovered) == (0, 0)
    assert by_depth["persistent"].f1_read is None
    assert by_depth["early"] == (1, 1, pytest.approx(0.9), pytest.approx(expected_read[0]),
                                 pytest.approx(expected[0]))  # fmt: skip


def test_uniqueness_counts_living_latents():
    directions = torch.eye(6)[:4]
    rows = torch.eye(6)[[0, 0, 1, 2]]
    assert uniqueness(rows, directions, torch.ones(4, dtype=torch.bool)) == 3 / 4
    assert uniqueness(rows, directions, torch.tensor([True, False, True, True])) == 1


def test_a_crosscoder_has_the_direction_of_its_largest_block():
    sae = crosscoder("topk")
    n_blocks, d = sae.cfg.n_routed_layers, sae.cfg.d_model
    rows = decoder_rows(sae)
    for latent, row in enumerate(sae.W_dec.detach().view(-1, n_blocks, d)):
        assert torch.equal(rows[latent], max(row, key=lambda part: float(part.norm())))
