"""The truth scores 1, random directions score chance, and training finds known features."""

import itertools
from dataclasses import replace

import pytest
import torch
from sae_lens.synthetic import ConstantFiringProbabilityConfig, SyntheticModelConfig

from sae_lens_route.errors import UserError
from sae_lens_route.evals.concept_baselines import random_dictionary
from sae_lens_route.evals.concept_readers import MultiLayerReader
from sae_lens_route.saes import (
    RouteJumpReLUSAE,
    RouteJumpReLUSAEConfig,
    RouteTopKTrainingSAEConfig,
)
from sae_lens_route.saes.crosscoder import TopKTrainingCrosscoderConfig
from sae_lens_route.saes.loss import norm_mse
from sae_lens_route.saes.multi_layer import MultiLayerTopKTrainingConfig
from sae_lens_route.saes.router import normalize
from sae_lens_route.synthetic.dictionaries import (
    SyntheticDictionary,
    SyntheticEntry,
    known_dictionary,
    train_dictionaries,
)
from sae_lens_route.synthetic.score import score_dictionary
from sae_lens_route.synthetic.streams import SyntheticStreams, SyntheticStreamsConfig

N_FEATURES, D, L = 16, 24, 4
FEATURES = SyntheticModelConfig(
    num_features=N_FEATURES,
    hidden_dim=D,
    firing_probability=ConstantFiringProbabilityConfig(0.15),
    std_firing_magnitudes=0.2,
)
CLEAN = SyntheticStreamsConfig(
    FEATURES, n_blocks=L, mean_norm=0.0, dense_std=0.0, noise_std=0.0, ramp=0
)


@pytest.fixture
def orthogonal():
    """Streams whose directions are orthogonal, so that a linear encoder reads them exactly."""
    streams = SyntheticStreams(CLEAN)
    plane = torch.eye(D, dtype=torch.float64) - 1 / D  # of vectors with mean 0
    basis = torch.linalg.qr(plane @ torch.randn(D, N_FEATURES, dtype=torch.float64)).Q
    streams.directions.copy_(basis.T)
    return streams


def exact(streams, order=None, routing="uniform"):
    """The true directions with a threshold that only an active feature passes."""
    order = torch.arange(N_FEATURES) if order is None else order
    config = RouteJumpReLUSAEConfig(
        d_in=D, d_sae=N_FEATURES, n_routed_layers=L, routing=routing, scale_by_probability=False
    )
    sae = RouteJumpReLUSAE(config)
    sae.W_dec.data = streams.directions[order].clone()
    sae.W_enc.data = streams.directions[order].T.clone()
    sae.threshold.data = torch.full((N_FEATURES,), 1e-3)
    return sae


def samples_of(streams, n_batches=3, n_tokens=400):
    return list(itertools.islice(streams.batches(n_tokens, seed=9), n_batches))


def test_the_truth_scores_one_in_any_order(orthogonal):
    samples = samples_of(orthogonal)
    for order in (None, torch.randperm(N_FEATURES)):
        sae = exact(orthogonal, order)
        result = score_dictionary(orthogonal, SyntheticDictionary.of(sae, L), samples)
        for part in (result.overall, *result.by_depth.values()):
            assert (part.recovered, part.f1_read) == (1, 1)
            assert part.mean_cosine == pytest.approx(1)
        assert result.mean_max_cosine == pytest.approx(1)
        assert result.uniqueness == 1 and result.n_tokens == 1200
        assert result.norm_mse < 1e-9 and result.dead_latents == 0
        assert result.by_depth["persistent"].f1_anywhere == 1
        assert 0.3 < result.by_depth["early"].f1_anywhere < 0.8  # not there where it was read


def test_reading_all_blocks_finds_all_that_fires(orthogonal):
    blocks = tuple(range(L))
    sae = SyntheticDictionary.of(exact(orthogonal), L).reader.sae
    both = SyntheticDictionary(MultiLayerReader("all", sae), blocks)
    result = score_dictionary(orthogonal, both, samples_of(orthogonal))
    assert result.overall.f1_anywhere == result.overall.f1_read == 1
    assert result.router is None


def test_an_oracle_has_no_regret_and_uniform_routing_is_chance(orthogonal):
    samples = samples_of(orthogonal)
    oracle = SyntheticDictionary.of(exact(orthogonal), L, oracle=True)
    result = score_dictionary(orthogonal, oracle, samples).router
    assert result is not None
    assert result.mass.routed == result.best_block.routed == result.mass.gain == 1
    uniform = score_dictionary(orthogonal, SyntheticDictionary.of(exact(orthogonal), L), samples)
    assert uniform.router is not None
    assert abs(uniform.router.mass.gain) < 0.1
    mass = torch.cat([sample.mass for sample in samples]).double()
    best = mass.amax(-1, keepdim=True)
    relative = torch.where(best > 0, mass / best, 1.0)
    assert uniform.router.mass.uniform == pytest.approx(float(relative.mean()), rel=1e-6)


def test_a_router_that_sees_the_early_features_reads_them_where_they_are(orthogonal):
    sae = exact(orthogonal, routing="hard")
    early = orthogonal.directions[orthogonal.depth == 0].sum(0)
    late = orthogonal.directions[orthogonal.depth == 2].sum(0)
    ties = 0.01 * torch.randn(D, L)  # broken, where neither fires
    sae.W_router.data = torch.stack([early, 0 * early, 0 * early, late], dim=-1) + ties
    samples = samples_of(orthogonal)
    result = score_dictionary(orthogonal, SyntheticDictionary.of(sae, L), samples).router
    assert result is not None
    assert result.mass.gain > 0.4 and result.mass.gain_at_shares > 0.4
    errors, chosen = [], []
    for sample in samples:  # the routes and the errors again, from x itself
        n = normalize(sample.streams)
        route = (n.sum(1) @ sae.W_router).argmax(-1)
        errors.append(norm_mse(sae(n.flatten(0, 1)), n.flatten(0, 1)).view(-1, L))
        chosen.append(torch.nn.functional.one_hot(route, L))
    shares = torch.cat(chosen).double().mean(0)
    assert list(result.share_by_block.values()) == pytest.approx(shares.tolist())
    assert result.norm_mse.uniform == pytest.approx(torch.cat(errors).mean().item(), abs=1e-9)


def test_random_directions_recover_next_to_nothing():
    wide = replace(FEATURES, hidden_dim=128)
    streams = SyntheticStreams(replace(CLEAN, features=wide, noise_std=0.02))
    known = known_dictionary(streams, k=2)
    samples = samples_of(streams)
    true = score_dictionary(streams, known, samples)
    assert true.overall.recovered == 1
    rows = random_dictionary(known.reader.sae)
    random = score_dictionary(streams, SyntheticDictionary.of(rows, L), samples)
    assert random.overall.recovered == 0
    assert random.overall.mean_cosine < 0.3
    assert (random.overall.f1_read or 0) < (true.overall.f1_read or 0) - 0.2
    assert random.norm_mse > 1.5 * true.norm_mse


def route(**fields):
    return RouteTopKTrainingSAEConfig(d_in=D, d_sae=N_FEATURES, k=3, **fields)


def test_training_finds_the_features_that_are_there():
    streams = SyntheticStreams(replace(CLEAN, noise_std=0.02))
    many = {"d_sae": N_FEATURES, "k": 3, "n_routed_layers": L}
    entries = {
        "uniform": SyntheticEntry(route(routing="uniform", n_routed_layers=L)),
        "oracle": SyntheticEntry(route(routing="uniform", n_routed_layers=L), oracle=True),
        "block 0": SyntheticEntry(route(n_routed_layers=1), blocks=(0,)),
        "blocks 0 and 3": SyntheticEntry(route(n_routed_layers=2), blocks=(0, 3)),
        "multi-layer": SyntheticEntry(MultiLayerTopKTrainingConfig(d_in=D, **many)),
        "crosscoder": SyntheticEntry(TopKTrainingCrosscoderConfig(d_in=L * D, **many)),
    }
    options = {"training_tokens": 128 * 160, "batch_size": 128, "lr": 1e-2, "lr_decay_steps": 50}
    trained = train_dictionaries(streams, entries, **options)
    samples = samples_of(streams)
    results = {name: score_dictionary(streams, d, samples) for name, d in trained.items()}
    for name in ("uniform", "oracle", "multi-layer", "crosscoder"):
        assert results[name].overall.recovered > 0.6, name
        assert results[name].norm_mse < 0.45, name
    block_0 = results["block 0"]
    assert block_0.by_depth["early"].recovered > 0.7
    assert block_0.by_depth["late"].recovered == 0
    assert block_0.by_depth["late"].f1_read is None  # never there
    oracle = results["oracle"].router
    assert oracle is not None and oracle.mass.routed == 1
    others = ("block 0", "blocks 0 and 3", "multi-layer", "crosscoder")
    assert all(results[name].router is None for name in others)
    alone = train_dictionaries(streams, {"block 0": entries["block 0"]}, **options)
    assert torch.equal(alone["block 0"].reader.sae.W_dec, trained["block 0"].reader.sae.W_dec)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (SyntheticEntry(route(n_routed_layers=3)), "n_routed_layers=3, but it reads 4 blocks"),
        (
            SyntheticEntry(route(n_routed_layers=1), blocks=(4,)),
            "must ascend and be some of 0 to 3",
        ),
        (SyntheticEntry(route(n_routed_layers=2), blocks=(2, 1)), "must ascend"),
        (
            SyntheticEntry(route(n_routed_layers=L), oracle=True),
            "in the place of routing='uniform'",
        ),
    ],
)
def test_entries_that_cannot_be_trained(entry, message):
    with pytest.raises(UserError, match=message):
        train_dictionaries(SyntheticStreams(CLEAN), {"one": entry}, training_tokens=8, batch_size=8)
