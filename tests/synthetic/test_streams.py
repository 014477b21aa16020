"""Known features: how often they fire, where they live, what the streams are made of."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from sae_lens.synthetic import (
    ConstantFiringProbabilityConfig,
    HierarchyConfig,
    LowRankCorrelationConfig,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
)

from sae_lens_route.errors import UserError
from sae_lens_route.saes.router import normalize
from sae_lens_route.synthetic.streams import DEPTHS, SyntheticStreams, SyntheticStreamsConfig

FEATURES = SyntheticModelConfig(
    num_features=64,
    hidden_dim=32,
    firing_probability=ZipfianFiringProbabilityConfig(0.7, max_prob=0.3, min_prob=0.02),
    std_firing_magnitudes=0.2,
)
SMALL = SyntheticStreamsConfig(FEATURES)
BARE = replace(SMALL, mean_norm=0.0, dense_std=0.0, noise_std=0.0)


def drawn(cfg, n_tokens=20_000, seed=1):
    streams = SyntheticStreams(cfg)
    return streams, next(streams.batches(n_tokens, seed))


def in_five_deviations(share, p, n):
    return ((share - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()


def test_features_fire_as_often_as_zipf_says():
    _, sample = drawn(SMALL)
    rank = torch.arange(1, 65).double()
    zipf = rank**-0.7
    p = 0.02 + 0.28 * (zipf - zipf[-1]) / (zipf[0] - zipf[-1])
    assert in_five_deviations((sample.firing > 0).double().mean(0), p, 20_000)
    fired = sample.firing[sample.firing > 0]
    assert float(fired.mean()) == pytest.approx(1, abs=5 * 0.2 / len(fired) ** 0.5)
    assert float(fired.std()) == pytest.approx(0.2, rel=0.02)


def test_the_number_of_active_features_by_block():
    streams, sample = drawn(SMALL)
    p = streams.model.activation_generator.firing_probabilities
    expected = torch.stack([p[streams.amplitude[:, block] > 0].sum() for block in range(8)])
    measured = streams.true_l0(sample.firing)
    assert (measured - expected).abs().max() < 5 * (float(p.sum()) / 20_000) ** 0.5


def amplitude_by_hand(start, stop, ramp, n_blocks=8):
    def at(block):
        distance = max(start - block, block - stop, 0)
        return max(0.0, 1 - distance / (ramp + 1))

    return [at(block) for block in range(n_blocks)]


@pytest.mark.parametrize("ramp", [0, 1, 2])
def test_every_profile_rises_stays_and_falls(ramp):
    streams = SyntheticStreams(replace(SMALL, ramp=ramp))
    for amplitude, depth in zip(streams.amplitude.tolist(), streams.depth.tolist(), strict=True):
        at_full = [block for block, a in enumerate(amplitude) if a == 1]
        start, stop = at_full[0], at_full[-1]
        assert amplitude == pytest.approx(amplitude_by_hand(start, stop, ramp))
        expected = {
            "early": start == 0 and stop <= 2,
            "middle": start >= 2 and stop <= 5,
            "late": start >= 5 and stop == 7,
            "persistent": (start, stop) == (0, 7),
        }
        assert expected[DEPTHS[depth]], (DEPTHS[depth], start, stop)


def test_classes_share_the_frequencies():
    streams = SyntheticStreams(SMALL)
    assert streams.depth.view(-1, 4).sort(-1).values.tolist() == [[0, 1, 2, 3]] * 16


@pytest.mark.parametrize("n_blocks", [4, 5, 9])
def test_other_numbers_of_blocks(n_blocks):
    streams = SyntheticStreams(replace(SMALL, n_blocks=n_blocks, ramp=0))
    present = streams.amplitude > 0
    assert present.any(1).all()
    early, late = streams.depth == 0, streams.depth == 2
    assert not present[early, n_blocks // 2 :].any()
    assert not present[late, : n_blocks - n_blocks // 2].any()


def test_streams_are_sums_of_what_is_active_in_float64():
    streams, sample = drawn(BARE, 50)
    z, a, d = (part.double() for part in (sample.firing, streams.amplitude, streams.directions))
    for token, block in itertools.product(range(0, 50, 7), range(8)):
        parts = [z[token, f] * a[f, block] * d[f] for f in range(64)]
        expected = 1.25**block * torch.stack(parts).sum(0)
        torch.testing.assert_close(
            sample.streams[token, block].double(), expected, atol=1e-5, rtol=0
        )
        mass = math.fsum(float(part.square().sum()) for part in parts)
        assert float(sample.mass[token, block]) == pytest.approx(mass, rel=1e-5)


def test_nuisance_has_the_size_that_was_asked_for():
    silent = replace(FEATURES, firing_probability=ConstantFiringProbabilityConfig(0.0))
    streams, sample = drawn(replace(SMALL, features=silent, norm_growth=1.0))
    mean = sample.streams.mean(0)
    torch.testing.assert_close(mean, streams.mean, atol=0.05, rtol=0)
    assert mean.norm(dim=-1).tolist() == pytest.approx([3] * 8, abs=0.05)
    assert float(torch.cosine_similarity(mean[0], mean[-1], dim=0)) == pytest.approx(
        math.cos(math.pi / 4), abs=0.02
    )
    rest = sample.streams - streams.mean
    variance = rest.double().square().sum(-1).mean()  # two dense directions and 32 coordinates
    assert float(variance) == pytest.approx(2 + 32 * 0.1**2, rel=0.03)
    noise = rest[:, 0] - rest[:, 1]  # dense is the same at all blocks, the noise is not
    assert float(noise.std()) == pytest.approx(0.1 * 2**0.5, rel=0.01)


def test_the_norm_grows_and_normalization_takes_it_out():
    flat, grown = (drawn(replace(SMALL, norm_growth=g), 200)[1].streams for g in (1.0, 1.5))
    torch.testing.assert_close(grown[:, 3], flat[:, 3] * 1.5**3)
    torch.testing.assert_close(normalize(grown), normalize(flat), atol=1e-4, rtol=0)
    assert SyntheticStreams(SMALL).directions.mean(-1).abs().max() < 1e-7


def test_a_seed_decides_everything():
    one, other = SyntheticStreams(SMALL), SyntheticStreams(SMALL)
    assert torch.equal(one.amplitude, other.amplitude)
    first = list(itertools.islice(one.batches(100, seed=3), 2))
    torch.randn(5)  # what else is drawn has no influence
    second = list(itertools.islice(other.batches(100, seed=3), 2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.streams, b.streams) and torch.equal(a.firing, b.firing)
    assert not torch.equal(first[0].firing, first[1].firing)
    assert not torch.equal(first[0].firing, next(one.batches(100, seed=4)).firing)
    before = torch.get_rng_state()
    next(one.batches(10, seed=0))
    assert torch.equal(before, torch.get_rng_state())
    another = SyntheticStreams(replace(SMALL, seed=1))
    assert not torch.equal(another.directions, one.directions)
    assert not torch.equal(another.amplitude, one.amplitude)


def test_correlated_features_keep_their_frequencies():
    correlation = LowRankCorrelationConfig(rank=1, correlation_scale=0.7)
    streams, sample = drawn(replace(SMALL, features=replace(FEATURES, correlation=correlation)))
    fires = (sample.firing > 0).double()
    p = streams.model.activation_generator.firing_probabilities.double()
    assert in_five_deviations(fires.mean(0), p, 20_000)
    _, independent = drawn(SMALL)
    correlations = [torch.corrcoef(f.T).fill_diagonal_(0).abs().mean() for f in
                    (fires, (independent.firing > 0).double())]  # fmt: skip
    assert correlations[0] > 5 * correlations[1]


def test_children_fire_with_their_parents_alone():
    hierarchy = HierarchyConfig(total_root_nodes=4, branching_factor=3, max_depth=1)
    streams, sample = drawn(replace(SMALL, features=replace(FEATURES, hierarchy=hierarchy)))
    fires = sample.firing > 0
    for root in streams.model.hierarchy.roots:
        children = [child.feature_index for child in root.children]
        assert len(children) == 3
        assert fires[:, children].any()
        assert not fires[~fires[:, root.feature_index]][:, children].any()


def test_where_a_feature_is_active():
    streams, sample = drawn(BARE, 30)
    blocks = torch.randint(8, sample.firing.shape)
    active = streams.fires_at(sample.firing, blocks)
    for token, feature in itertools.product(range(30), range(64)):
        a = float(streams.amplitude[feature, blocks[token, feature]])
        assert bool(active[token, feature]) == (float(sample.firing[token, feature]) * a > 0)


def test_what_cannot_be_made():
    with pytest.raises(UserError, match="n_blocks=3"):
        replace(SMALL, n_blocks=3)
    with pytest.raises(UserError, match="ramp=-1"):
        replace(SMALL, ramp=-1)
