"""Probes: which features they take, and that the fit is scikit-learn's on all tokens."""

import sys

import numpy as np
import pytest
from support.concept_classifiers import best_by_loops, f1_of, sparse_table

from sae_lens_route.errors import UserError
from sae_lens_route.evals.concept_probes import probe_f1
from sae_lens_route.evals.concept_tables import DenseTable

linear_model = pytest.importorskip("sklearn.linear_model")


def data(seed, n=400):
    """Features of which 0 and 1 say something about the first concept, 3 about the second."""
    rng = np.random.default_rng(seed)
    labels = rng.random((n, 2)) < (0.3, 0.15)
    values = rng.random((n, 5)) * (rng.random((n, 5)) < 0.2)
    values[:, 0] += labels[:, 0] * (rng.random(n) < 0.7)
    values[:, 1] += labels[:, 0] * (rng.random(n) < 0.5)
    values[:, 3] += labels[:, 1] * rng.random(n)
    return values, labels


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_a_probe_is_a_regression_on_the_features_that_differ_most(kind):
    (x, y), (x_test, y_test) = data(0), data(1)
    if kind == "dense":
        x, x_test = x - 0.3, x_test - 0.3
        tables = DenseTable(x, 0), DenseTable(x_test, 0)
    else:
        tables = sparse_table(x), sparse_table(x_test)
    scores = probe_f1(*tables, y, y_test, (1, 2))
    for concept, columns in ((0, [0, 1]), (1, [3])):
        positive = y[:, concept]
        difference = [abs(c[positive].mean() - c[~positive].mean()) for c in x.T]
        ranked = sorted(range(5), key=lambda i: -difference[i])
        assert ranked[: len(columns)] == columns
        for k in (1, 2):
            scale = x[:, ranked[:k]].std(0)
            fitted = linear_model.LogisticRegression(max_iter=1000, tol=1e-8)
            fitted.fit(x[:, ranked[:k]] / scale, positive)
            score = fitted.decision_function(x[:, ranked[:k]] / scale)
            least = float(np.finfo(np.float64).min)
            ((_, _, threshold),) = best_by_loops([score.tolist()], positive[:, None], least)
            found = fitted.decision_function(x_test[:, ranked[:k]] / scale) > threshold
            expected = float(f1_of(found.tolist(), y_test[:, concept].tolist()))
            # the two fits stop at points that differ by the solver's tolerance: a token on the
            # threshold may change sides
            assert scores[concept][k] == pytest.approx(expected, abs=0.02)
    assert scores[0][2] > scores[0][1]


def test_a_concept_of_every_token_can_be_probed():
    x, _ = data(0)
    everywhere = np.ones((400, 1), dtype=bool)
    table = sparse_table(x)
    assert probe_f1(table, table, everywhere, everywhere, (1,)) == [{1: 1.0}]


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    x, y = data(0)
    table = sparse_table(x)
    with pytest.raises(UserError, match=r"sae-lens-route\[concepts\]"):
        probe_f1(table, table, y, y, (1,))
