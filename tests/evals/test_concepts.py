"""The whole measurement on the tiny Llama: one reading, and each number from the text by loops."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import hypergeom
from support.concept_classifiers import LEVELS, best_by_loops, f1_of, random_concept_tokens

from sae_lens_route.data.annotations import Concept
from sae_lens_route.errors import UserError
from sae_lens_route.evals.concept_baselines import PCAReader, ResidualReader, random_dictionary
from sae_lens_route.evals.concept_readers import SAEReader, UnionReader
from sae_lens_route.evals.concepts import ConceptRecovery, recover_concepts

PROBES = (1, 2)


@pytest.fixture(scope="module")
def text():
    """Concept 3 is a token id below 100; the others are random."""
    tokens = random_concept_tokens(n=40)
    labels = tokens.labels.clone()
    labels[..., 3] = tokens.tokens < 100
    return tokens._replace(labels=labels)


@pytest.fixture(scope="module")
def readers(route_sae, crosscoder):
    return [
        SAEReader("route", route_sae),
        SAEReader("crosscoder", crosscoder),
        SAEReader("random", random_dictionary(route_sae)),
        ResidualReader("residual", route_sae, 6),
        PCAReader("PCA", route_sae, 6),
    ]


@pytest.fixture(scope="module")
def recovery(tinyllama, readers, text):
    return recover_concepts(tinyllama, readers, text, batch_size=7)


def counted(text):
    """Rows and positions of the annotated tokens of the dev and of the test half."""
    places = (text.annotated & (text.tokens > 1)).nonzero().tolist()
    halves = [[(r, p) for r, p in places if bool(text.is_test[r]) == half] for half in (0, 1)]
    return [tuple(np.array(half).T) for half in halves]


@torch.no_grad()
def activations(model, sae, text):
    _, cache = model.run_with_cache(text.tokens, names_filter=sae.cfg.metadata.hook_names)
    streams = torch.stack([cache[name] for name in sae.cfg.metadata.hook_names], dim=2)
    routing = sae.route(streams)
    acts = sae.encode(routing.x_route) / routing.weight.unsqueeze(-1)
    return acts.numpy(), routing.route.numpy()


def test_the_scores_of_an_sae_from_a_plain_forward_pass(tinyllama, route_sae, recovery, text):
    acts, route = activations(tinyllama, route_sae, text)
    dev, test = counted(text)
    labels = text.labels.numpy()
    scores = recovery.dictionaries["route"]
    assert (recovery.n_dev_tokens, recovery.n_test_tokens) == (len(dev[0]), len(test[0]))
    assert recovery.n_test_documents == 10
    expected = best_by_loops(acts[dev].T.tolist(), labels[dev], least=0.0)
    for i, (concept, (f1_dev, feature, threshold)) in enumerate(
        zip(scores.concepts, expected, strict=True)
    ):
        assert (concept.name, concept.level) == (f"c{i}", LEVELS[i % 2])
        assert (
            concept.n_dev == labels[dev][:, i].sum() and concept.n_test == labels[test][:, i].sum()
        )
        # batches of another size: the activations differ in the last bits
        assert (concept.f1_dev, concept.feature, concept.sign) == (float(f1_dev), feature, 1)
        assert concept.threshold == pytest.approx(threshold, rel=1e-4)
        active, positive = acts[test][:, feature] > concept.threshold, labels[test][:, i]
        assert concept.f1 == float(f1_of(active.tolist(), positive.tolist()))
        found = int((active & positive).sum())
        assert (
            concept.precision == found / active.sum() and concept.recall == found / positive.sum()
        )
        blocks = [
            3 + int(r)
            for half in (dev, test)
            for r in route[half][acts[half][:, feature] > concept.threshold * (1 + 1e-5)]
        ]
        shares = {block: blocks.count(block) / len(blocks) for block in set(blocks)}
        assert concept.share_by_block == pytest.approx(shares)
        assert concept.mean_block == pytest.approx(sum(blocks) / len(blocks))
    n_active = (np.concatenate([acts[dev], acts[test]]) > 0).sum(0)
    n_tokens = len(dev[0]) + len(test[0])
    assert scores.n_features == 128
    assert scores.dead_features == (n_active == 0).sum()
    assert scores.dense_features == (n_active > 0.1 * n_tokens).sum() > 0


def test_means_over_concepts_by_level(recovery):
    for scores in recovery.dictionaries.values():
        assert list(scores.levels) == list(LEVELS)
        for name, level in {"all": scores.overall, **scores.levels}.items():
            concepts = [c for c in scores.concepts if name in ("all", c.level)]
            assert level.n_concepts == len(concepts) == (4 if name == "all" else 2)
            f1 = math.fsum(c.f1 for c in concepts) / len(concepts)
            assert level.f1 == pytest.approx(f1, rel=1e-12)
            shuffled = math.fsum(c.f1_shuffled for c in concepts) / len(concepts)
            assert level.f1_shuffled == pytest.approx(shuffled, rel=1e-12)
            low, high = level.f1_interval
            assert low < level.f1 < high and high - low < 0.5
        precise = [level.precise_features for level in scores.levels.values()]
        assert scores.overall.precise_features == sum(precise)


def test_random_labels_and_shuffled_ones_are_at_chance(recovery):
    """Hits among the test tokens are those of a random draw (1 - 1e-6 of the hypergeometric)."""
    n = recovery.n_test_tokens
    for name, scores in recovery.dictionaries.items():
        for concept in scores.concepts[:3]:
            found = round(concept.recall * concept.n_test)
            n_active = round(found / concept.precision)
            assert found <= hypergeom.isf(1e-6, n, concept.n_test, n_active), name
        for concept in scores.concepts:
            sizes = np.arange(1, n + 1)  # of the draw, which the result does not say
            most = hypergeom.isf(1e-6, n, concept.n_test, sizes)
            limit = (2 * most / (sizes + concept.n_test)).max()
            assert 0 < concept.f1_shuffled <= limit < 0.6, name


def test_where_features_of_crosscoders_and_dimensions_live(recovery, crosscoder):
    norms = crosscoder.W_dec.detach().view(128, 3, 64).norm(dim=-1)
    for concept in recovery.dictionaries["crosscoder"].concepts:
        shares = norms[concept.feature] / norms[concept.feature].sum()
        expected = dict(zip((3, 4, 6), shares.tolist(), strict=True))
        assert concept.share_by_block == pytest.approx(expected, rel=1e-4)
    for name in ("residual", "PCA"):
        scores = recovery.dictionaries[name]
        assert scores.n_features == 128 and scores.dead_features == 0
        assert all(c.share_by_block == {6: 1.0} and c.sign in (1, -1) for c in scores.concepts)


def test_readers_do_not_depend_on_each_other(tinyllama, readers, recovery, text):
    """The same results in another order and without one of them."""
    again = recover_concepts(tinyllama, readers[::-1][:4], text, batch_size=7)
    for name, scores in again.dictionaries.items():
        assert scores == recovery.dictionaries[name]
    assert "route" not in again.dictionaries


def test_results_survive_json(recovery):
    assert ConceptRecovery.from_dict(json.loads(json.dumps(recovery.to_dict()))) == recovery
    assert "NaN" not in json.dumps(recovery.to_dict(), allow_nan=False)


def test_probes_are_part_of_the_result(tinyllama, route_sae, text):
    pytest.importorskip("sklearn")
    readers = [SAEReader("route", route_sae), UnionReader("two", [SAEReader("a", route_sae)] * 2)]
    result = recover_concepts(tinyllama, readers, text, probe_sizes=PROBES)
    route, two = result.dictionaries.values()
    for scores in (route, two):
        for k in PROBES:
            values = [c.probe_f1[k] for c in scores.concepts]
            assert all(0 <= value <= 1 for value in values)
            assert scores.overall.probe_f1[k] == pytest.approx(sum(values) / 4, rel=1e-12)
    assert ConceptRecovery.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    # each feature is there twice: the first of the two is chosen
    assert two.n_features == 256 and two.dead_features == 2 * route.dead_features
    assert [c.feature for c in two.concepts] == [c.feature for c in route.concepts]


def test_what_cannot_be_measured_is_refused(tinyllama, route_sae, readers, text):
    with pytest.raises(UserError, match=r"readers=\['a', 'a'\]"):
        recover_concepts(tinyllama, [SAEReader("a", route_sae)] * 2, text)
    with pytest.raises(UserError, match=r"readers=\[\]"):
        recover_concepts(tinyllama, [], text)
    nowhere = text._replace(labels=text.labels & ~text.is_test[:, None, None])
    with pytest.raises(UserError, match="no token of the test half carries c0, c1, c2, c3"):
        recover_concepts(tinyllama, readers[:1], nowhere)
    labels = text.labels.clone()
    labels[..., 3] &= text.is_test[:, None]
    one = text._replace(labels=labels, concepts=(*text.concepts[:3], Concept("rare", "word")))
    with pytest.raises(UserError, match="no token of the dev half carries rare"):
        recover_concepts(tinyllama, readers[:1], one)
