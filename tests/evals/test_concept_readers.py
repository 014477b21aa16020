"""Readers and baselines: each table is what the SAE's own methods, or explicit loops, compute."""

import numpy as np
import pytest
import torch
from sae_lens import TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata
from support.architectures import ARCHITECTURES, encode_by_hand, random_sae, random_streams
from support.crosscoders import crosscoder, explicit_codes, explicit_normed

from sae_lens_route.data.reading import ActivationBatch
from sae_lens_route.errors import UserError
from sae_lens_route.evals.concept_baselines import PCAReader, ResidualReader, random_dictionary
from sae_lens_route.evals.concept_readers import (
    MultiLayerReader,
    SAEReader,
    UnionReader,
    reader_of,
)
from sae_lens_route.saes import (
    MultiLayerTopKTrainingConfig,
    MultiLayerTopKTrainingSAE,
    RouteTopKSAE,
    TopKCrosscoder,
)
from sae_lens_route.saes.inference import to_inference
from sae_lens_route.saes.routed import uniform_from_the_seed

BLOCKS, N, POS = (2, 5, 9), 6, 7

pytestmark = pytest.mark.usefixtures("no_gradients")


def of_blocks(sae, blocks=BLOCKS):
    sae.cfg.metadata = SAEMetadata(routed_blocks=list(blocks))
    return sae


def route_sae(architecture="topk", **options):
    return of_blocks(to_inference(random_sae(architecture, **options)))


def batches(d=6, seed=1):
    """Two batches, one with an empty context, and the streams of their kept tokens."""
    streams = random_streams(N * POS, d=d, seed=seed).view(N, POS, 3, d)
    kept = torch.rand(N, POS, generator=torch.Generator().manual_seed(seed)) < 0.7
    kept[1] = False
    tokens = torch.zeros(N, POS, dtype=torch.int64)
    parts = [
        ActivationBatch(tokens[rows], streams[rows], kept[rows], BLOCKS)
        for rows in (slice(0, 2), slice(2, N))
    ]
    return parts, streams[kept]


def table_of(reader, d=6, n_dev=0):
    parts, streams = batches(d)
    with uniform_from_the_seed(reader.saes[0]):
        return reader.table([reader.read(part) for part in parts], n_dev), streams


def per_n(sae, streams):
    """Activations in units of n(x): those of x_route over each token's p."""
    routing = sae.route(streams)
    return sae.encode(routing.x_route) / routing.weight.unsqueeze(-1)


@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "standard", "gated"])
def test_a_route_saes_table_is_what_it_encodes_in_units_of_n(architecture):
    sae = route_sae(architecture)
    table, streams = table_of(SAEReader("a", sae))
    assert np.array_equal(table.values.toarray(), per_n(sae, streams).numpy())
    assert table.values.dtype == np.float64 and table.values.nnz
    p, routes = sae.route(streams).probs.max(-1)
    normed = torch.stack([explicit_normed(s) for s in streams.unbind(1)], dim=1)
    x_route = p[:, None] * normed[torch.arange(len(p)), routes]
    by_hand = encode_by_hand(sae, x_route) / p[:, None]
    torch.testing.assert_close(torch.tensor(table.values.toarray()), by_hand)


def test_a_feature_lives_where_its_activations_above_the_threshold_were_read():
    sae = route_sae(spread=4.0)
    table, streams = table_of(SAEReader("a", sae))
    acts, route = per_n(sae, streams), sae.route(streams).route
    several = 0
    for feature in range(sae.cfg.d_sae):
        for threshold in (0.0, float(acts[:, feature].median()), 1e9):
            blocks = [BLOCKS[r] for r in route[acts[:, feature] > threshold].tolist()]
            expected = {b: blocks.count(b) / len(blocks) for b in sorted(set(blocks))}
            assert table.share_by_block(feature, threshold) == pytest.approx(expected)
            several += len(expected) > 1
    assert several > 5


def test_uniform_routing_reads_from_its_seed_on():
    """The same draws as one call of `encode_layers` per batch, and again the next time."""
    sae = of_blocks(to_inference(random_sae("topk", routing="uniform")))
    table, _ = table_of(SAEReader("a", sae))
    with uniform_from_the_seed(sae):
        acts = torch.cat([sae.encode_layers(b.activations[b.kept]) for b in batches()[0]])
    assert np.array_equal(table.values.toarray(), acts.numpy())
    again, _ = table_of(SAEReader("a", sae))
    assert np.array_equal(table.values.toarray(), again.values.toarray())


def test_a_multi_layer_sae_is_read_at_every_block():
    """Loop over tokens and features: the largest activation, and the block it is at."""
    sae = of_blocks(to_inference(random_sae("topk", routing="uniform")))
    table, streams = table_of(MultiLayerReader("mlsae", sae))
    by_block = torch.stack([encode_by_hand(sae, explicit_normed(s)) for s in streams.unbind(1)])
    values, places = table.values.toarray(), table.blocks.toarray()
    for token in range(len(streams)):
        for feature in range(sae.cfg.d_sae):
            acts = by_block[:, token, feature].tolist()
            assert values[token, feature] == pytest.approx(max(acts), rel=1e-12)
            block = BLOCKS[acts.index(max(acts))] + 1 if max(acts) > 0 else 0
            assert places[token, feature] == block
    assert len(np.unique(places)) == 4


def test_a_crosscoders_features_live_where_their_decoder_is():
    sae = of_blocks(crosscoder("topk", layers=3, width=6))
    table, streams = table_of(SAEReader("a", sae))
    assert np.array_equal(table.values.toarray(), sae.encode_layers(streams).numpy())
    torch.testing.assert_close(
        torch.tensor(table.values.toarray()), explicit_codes(sae, streams), rtol=1e-9, atol=1e-9
    )
    rows = sae.W_dec.view(-1, 3, 6)
    for feature in (0, 7, 39):
        norms = [float(row.pow(2).sum() ** 0.5) for row in rows[feature]]
        shares = {b: norm / sum(norms) for b, norm in zip(BLOCKS, norms, strict=True)}
        assert table.rows(slice(0, 4)).share_by_block(feature, 0.0) == pytest.approx(shares)


def test_a_union_has_the_features_of_all():
    saes = [of_blocks(to_inference(random_sae("topk", n_layers=1, seed=i)), [b]) for i, b in
            enumerate(BLOCKS)]  # fmt: skip
    readers = [SAEReader(f"block {b}", sae) for b, sae in zip(BLOCKS, saes, strict=True)]
    table, streams = table_of(UnionReader("all", readers))
    acts = [per_n(sae, streams[:, [i]]) for i, sae in enumerate(saes)]
    assert np.array_equal(table.values.toarray(), torch.cat(acts, dim=-1).numpy())
    assert table.n_features == 36
    alive = [i for i in range(36) if len(table.active(i, 0.0))]
    assert {tuple(table.share_by_block(i, 0.0)) for i in alive} == {(2,), (5,), (9,)}
    assert table.share_by_block(alive[-1], 0.0) == {9: 1.0}


def test_dimensions_of_a_normalized_stream():
    table, streams = table_of(ResidualReader("block 5", route_sae(), 5))
    torch.testing.assert_close(torch.tensor(table.values), explicit_normed(streams[:, 1]))
    assert table.share_by_block(3, 0.0) == {5: 1.0}


def test_principal_components_are_those_of_the_dev_half():
    n_dev = 20
    table, streams = table_of(PCAReader("block 9", route_sae(), 9), n_dev=n_dev)
    x = explicit_normed(streams[:, 2]).numpy()
    mean = x[:n_dev].mean(0)
    _, sizes, components = np.linalg.svd(x[:n_dev] - mean, full_matrices=False)
    scores = (x - mean) @ components.T
    # a component's sign is arbitrary; n(x) has mean 0 over d, so that the last variance is 0
    signs = np.sign((scores * table.values).sum(0))
    assert sizes[-2] > 1e-3
    np.testing.assert_allclose(table.values[:, :-1], (signs * scores)[:, :-1], atol=1e-9)


def test_a_random_dictionary_keeps_shape_sparsity_routing_and_center():
    sae = route_sae()
    random = random_dictionary(sae, seed=3)
    assert isinstance(random, RouteTopKSAE) and random.W_dec.shape == sae.W_dec.shape
    streams = random_streams(50)
    assert torch.equal(random.route(streams).route, sae.route(streams).route)
    assert torch.equal(random.W_enc, random.W_dec.T) and not random.b_enc.any()
    torch.testing.assert_close(random.W_dec.norm(dim=-1), torch.ones(12, dtype=torch.float64))
    torch.testing.assert_close(random.b_dec, sae.b_dec)
    cosine = torch.nn.functional.cosine_similarity(random.W_dec, sae.W_dec)
    assert cosine.abs().max() < 0.999
    acts = random.encode_layers(streams)
    assert ((acts > 0).sum(-1) <= 3).all() and (acts > 0).sum(-1).double().mean() > 2
    assert not torch.equal(random_dictionary(sae, seed=4).W_dec, random.W_dec)
    assert random.cfg.metadata.routed_blocks == list(BLOCKS)


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - {"topk"}))
def test_a_random_dictionary_of_another_architecture_needs_a_k(architecture):
    sae = route_sae(architecture)
    with pytest.raises(UserError, match=r"k=None.*give k"):
        random_dictionary(sae)
    assert random_dictionary(sae, k=2).cfg.k == 2


def test_a_random_crosscoder():
    sae = of_blocks(crosscoder("topk", layers=3, width=6))
    random = random_dictionary(sae)
    assert isinstance(random, TopKCrosscoder) and random.W_dec.shape == (40, 18)
    table, _ = table_of(SAEReader("random", random))
    assert table.values.toarray().shape[1] == 40


def test_readers_by_class_and_what_has_none():
    cfg = MultiLayerTopKTrainingConfig(d_in=6, d_sae=12, k=3, n_routed_layers=3)
    assert isinstance(reader_of("a", MultiLayerTopKTrainingSAE(cfg)), MultiLayerReader)
    assert type(reader_of("a", route_sae())) is SAEReader
    with pytest.raises(UserError, match="a TopKSAE is neither"):
        reader_of("a", TopKSAE(TopKSAEConfig(d_in=6, d_sae=12, k=3)))
    with pytest.raises(UserError, match="all blocks at once"):
        MultiLayerReader("a", crosscoder("topk"))
    with pytest.raises(UserError, match=r"does not read block 4; it reads \[2, 5, 9\]"):
        ResidualReader("a", route_sae(), 4)
    with pytest.raises(UserError, match="a union is one of RouteSAEs"):
        UnionReader("a", [SAEReader("b", crosscoder("topk"))])
