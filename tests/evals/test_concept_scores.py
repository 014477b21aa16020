"""The choice of features, counts and intervals against loops over every classifier."""

import itertools

import numpy as np
import pytest
from scipy.stats import hypergeom
from support.concept_classifiers import best_by_loops, f1_of, sparse_table, tied_activations

from sae_lens_route.evals import concept_tables
from sae_lens_route.evals.concept_scores import (
    MIN_TRUE_POSITIVES,
    BestFeatures,
    Counts,
    best_threshold,
    bootstrap,
    choose,
    classified,
    f1_scores,
    still_precise,
)
from sae_lens_route.evals.concept_tables import DenseTable


def random_labels(n_tokens, n_concepts, seed):
    rng = np.random.default_rng(seed)
    return rng.random((n_tokens, n_concepts)) < rng.uniform(0.05, 0.5, n_concepts)


@pytest.fixture(params=[1, 25, 2**19])
def chunk(request, monkeypatch):
    """A chunk for every feature, for a few, and for all."""
    monkeypatch.setattr(concept_tables, "CHUNK", request.param)


@pytest.mark.parametrize("seed", range(5))
def test_the_best_feature_and_threshold_of_sparse_activations(chunk, seed):
    """Exactly the first of all pairs in exact fractions, ties and dead features included."""
    values = tied_activations(23, 7, seed)
    labels = random_labels(23, 6, seed + 100)
    labels[:, 2] = False  # nothing to find
    best, _ = choose(sparse_table(values), labels)
    expected = best_by_loops(values.T.tolist(), labels, least=0.0)
    assert expected[2][1] == -1
    assert best.f1.tolist() == [float(f1) for f1, _, _ in expected]
    assert best.feature.tolist() == [feature for _, feature, _ in expected]
    assert best.threshold.tolist() == [threshold for _, _, threshold in expected]


@pytest.mark.parametrize("seed", range(3))
def test_the_best_dimension_and_sign_of_dense_activations(chunk, seed):
    rng = np.random.default_rng(seed)
    values = np.round(2 * rng.standard_normal((19, 4))).astype(np.float32) / 2
    labels = random_labels(19, 5, seed)
    table = DenseTable(values, block=3)
    best, _ = choose(table, labels)
    signed = [sign * values[:, i] for i in range(4) for sign in (1, -1)]
    least = float(np.finfo(np.float32).min)
    expected = best_by_loops([column.tolist() for column in signed], labels, least)
    assert best.f1.tolist() == [float(f1) for f1, _, _ in expected]
    assert best.feature.tolist() == [feature for _, feature, _ in expected]
    assert best.threshold.tolist() == [threshold for _, _, threshold in expected]
    columns = [table.column(feature) for feature in best.feature.tolist()]
    assert columns == [(feature // 2, (1, -1)[feature % 2]) for _, feature, _ in expected]
    for feature, threshold in zip(best.feature.tolist(), best.threshold.tolist(), strict=True):
        assert table.active(feature, threshold).tolist() == [
            i for i, x in enumerate(signed[feature]) if x > threshold
        ]


@pytest.mark.parametrize("seed", range(3))
def test_precise_features_by_loops(chunk, seed):
    """Of all concepts and thresholds that are precise: most positives, then fewest tokens."""
    rng = np.random.default_rng(seed)
    labels = rng.random((200, 4)) < 0.4
    values = tied_activations(200, 6, seed)
    values[:, 1] *= labels[:, 0]
    values[:, 4] *= labels[:, 2] | (rng.random(200) < 0.02)
    _, precise = choose(sparse_table(values), labels)
    expected = {}
    for feature, column in enumerate(values.T):
        found = []
        for threshold, concept in itertools.product({0.0, *column.tolist()}, range(4)):
            active = column > threshold
            hits = int((active & labels[:, concept]).sum())
            if hits >= MIN_TRUE_POSITIVES and hits / active.sum() >= 0.95:
                found.append((-hits, int(active.sum()), concept, threshold))
        if found:
            expected[feature] = min(found)[2:]
    assert set(expected) >= {1, 4}
    chosen = zip(precise.concept.tolist(), precise.threshold.tolist(), strict=True)
    assert dict(zip(precise.feature.tolist(), chosen, strict=True)) == expected

    # scored on the tokens they were chosen on, all stay precise; with the opposite labels none do
    table = sparse_table(values)
    assert still_precise(table, precise, labels).all()
    assert not still_precise(table, precise, ~labels).any()


def test_counts_by_document(chunk):
    values, labels = tied_activations(60, 5, 3), random_labels(60, 4, 3)
    documents = np.repeat(np.arange(6), 10)
    best = BestFeatures(
        np.array([0, 4, -1, 0]), np.array([0.0, 0.5, 0.0, 0.75]), np.array([0.5, 0.5, 0.0, 0.5])
    )
    table = sparse_table(values)
    counts = classified(table, best, labels, documents)
    for concept, document in itertools.product(range(4), range(6)):
        rows = documents == document
        feature = best.feature[concept]
        active = (values[rows, feature] > best.threshold[concept]) & (feature >= 0)
        positive = labels[rows, concept]
        assert [part[document, concept] for part in counts] == [
            (active & positive).sum(),
            (active & ~positive).sum(),
            (~active & positive).sum(),
        ]
    total = f1_scores(counts.of_all_documents())[0]
    active = values[:, 4] > 0.5
    assert total[1] == float(f1_of(active.tolist(), labels[:, 1].tolist()))
    assert total[2] == 0


def test_f1_without_anything_to_find_is_no_number():
    zero = np.zeros((1, 1), dtype=np.int64)
    assert np.isnan(f1_scores(Counts(zero, zero, zero)))
    assert np.isnan(f1_scores(Counts(zero, zero + 1, zero)))
    assert f1_scores(Counts(zero, zero, zero + 1)) == 0


def test_bootstrap_samples_are_sums_over_drawn_documents():
    rng = np.random.default_rng(0)
    counts = Counts(*(rng.integers(0, 4, (7, 3)) for _ in range(3)))
    counts.true_positives[1:, 2] = counts.false_negatives[1:, 2] = 0  # in the first document only
    samples = bootstrap(counts, n_samples=50, seed=4)
    times = np.random.default_rng(4).multinomial(7, np.full(7, 1 / 7), 50)
    for sample, drawn in zip(samples, times.tolist(), strict=True):
        documents = [i for i, n in enumerate(drawn) for _ in range(n)]
        assert len(documents) == 7
        for concept in range(3):
            found, wrong, missed = (
                sum(int(part[i, concept]) for i in documents) for part in counts
            )
            total = 2 * found + wrong + missed
            expected = 2 * found / total if found + missed else float("nan")
            assert sample[concept] == pytest.approx(expected, rel=1e-15, nan_ok=True)
    assert np.isnan(samples[:, 2]).any() and not np.isnan(samples[:, :2]).any()
    assert (bootstrap(counts, n_samples=50, seed=4)[:, :2] == samples[:, :2]).all()


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """100 sets of 60 documents from one source: a 95 % interval misses 13 of 100 once in 1,000."""
    rng = np.random.default_rng(0)
    misses = 0
    for _ in range(100):
        rate = rng.beta(8, 2, (60, 1))  # documents differ
        found = rng.binomial(5, rate)
        counts = Counts(found, rng.binomial(2, 0.5, (60, 1)), 5 - found)
        low, high = np.percentile(bootstrap(counts, n_samples=300), [2.5, 97.5])
        misses += not low <= 2 * 4 / (2 * 4 + 1 + 1) <= high
    assert misses <= 13


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_features_that_know_nothing_are_at_chance(kind):
    """On held-out tokens, hits of a feature chosen on the others are those of a random draw.

    Of a set of m tokens drawn without regard to the labels, the positives among them follow the
    hypergeometric distribution; each of the 40 concepts stays below its 1 - 1e-6 quantile.
    """
    rng = np.random.default_rng(1)
    values = rng.random((4000, 300 if kind == "sparse" else 60)).astype(np.float32)
    if kind == "sparse":
        values *= rng.random(values.shape) < 0.05
    table = sparse_table(values) if kind == "sparse" else DenseTable(values - 0.5, 0)
    labels = random_labels(4000, 40, 2)
    best, precise = choose(table.rows(slice(0, 2000)), labels[:2000])
    test = table.rows(slice(2000, 4000))
    counts = classified(test, best, labels[2000:], np.arange(2000) // 20).of_all_documents()
    for found, wrong, missed in zip(*(part[0].tolist() for part in counts), strict=True):
        limit = hypergeom.isf(1e-6, 2000, found + missed, found + wrong)
        assert found <= limit
    # F1 of the best draw of all is that of the whole text: 2 p / (1 + p)
    prevalence = labels[2000:].mean(0)
    assert f1_scores(counts).mean() < (2 * prevalence / (1 + prevalence)).mean()
    assert not still_precise(test, precise, labels[2000:]).any()
    planted = np.where(labels[:, [0]], values + 1, 0)
    known = sparse_table(planted)
    best, precise = choose(known.rows(slice(0, 2000)), labels[:2000])
    assert best.f1[0] == 1 and len(precise.feature) == values.shape[1]
    assert still_precise(known.rows(slice(2000, 4000)), precise, labels[2000:]).all()


def test_the_best_threshold_of_a_score():
    rng = np.random.default_rng(0)
    for _ in range(20):
        score = rng.integers(-3, 4, 30).astype(np.float64)
        positive = rng.random(30) < 0.4
        ((f1, _, threshold),) = best_by_loops(
            [score.tolist()], positive[:, None], float(np.finfo(np.float64).min)
        )
        assert best_threshold(score, positive) == threshold
        assert f1 == f1_of((score > threshold).tolist(), positive.tolist())
