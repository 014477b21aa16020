"""How well a few features together recover a concept: k-sparse probes (Gurnee et al. 2023,
"Finding Neurons in a Haystack").

The k features are those whose mean differs most between tokens with and without the concept. A
logistic regression is fitted to them on the dev half; the threshold on its score is the one with
the best F1 there, as for single features. F1 is that of the test half.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from sae_lens_route.errors import UserError
from sae_lens_route.evals.concept_scores import best_threshold
from sae_lens_route.evals.concept_tables import FeatureTable


def probe_f1(
    dev: FeatureTable,
    test: FeatureTable,
    dev_labels: Bool[np.ndarray, "n C"],
    test_labels: Bool[np.ndarray, "m C"],
    sizes: Sequence[int],
) -> list[dict[int, float]]:
    """F1 on the test half of the probes of each concept, by their number of features.

    Args:
        dev: Activations of the dev half, to choose features on and to fit to.
        test: Activations of the test half.
        dev_labels: `[tokens, C]`, which concepts each token of the dev half carries.
        test_labels: The same of the test half.
        sizes: Numbers of features.

    Raises:
        UserError: scikit-learn is not installed.
    """
    regression = _logistic_regression()
    ranked = _by_mean_difference(dev, dev_labels)[:, : max(sizes)]
    results = []
    for concept, columns in enumerate(ranked):
        x, x_test = dev.dense(columns), test.dense(columns)
        y, y_test = dev_labels[:, concept], test_labels[:, concept]
        results.append(
            {k: _f1_of_probe(regression, x[:, :k], y, x_test[:, :k], y_test) for k in sizes}
        )
    return results


def _by_mean_difference(
    table: FeatureTable, labels: Bool[np.ndarray, "tokens C"]
) -> Int[np.ndarray, "C columns"]:
    """Columns by falling difference of means, regardless of its sign."""
    n_positive = labels.sum(0)[:, None]
    sums, total = table.label_sums(labels), table.label_sums(np.ones((len(labels), 1), bool))
    with_concept = sums / np.maximum(n_positive, 1)
    without = (total - sums) / np.maximum(len(labels) - n_positive, 1)
    return np.argsort(-np.abs(with_concept - without), axis=1, kind="stable")


def _f1_of_probe(
    regression: Any,
    x: Float[np.ndarray, "n k"],
    y: Bool[np.ndarray, " n"],
    x_test: Float[np.ndarray, "m k"],
    y_test: Bool[np.ndarray, " m"],
) -> float:
    scale = x.std(0)
    scale[scale == 0] = 1
    x, x_test = x / scale, x_test / scale
    # most tokens activate none of the features: they are two rows with weights
    active = x.any(axis=1)
    n_silent = [(~active & ~y).sum(), (~active & y).sum()]
    rows = np.concatenate([x[active], np.zeros((2, x.shape[1]), x.dtype)])
    weights = np.concatenate([np.ones(active.sum()), n_silent])
    fitted = regression.fit(rows, np.append(y[active], [False, True]), weights)
    threshold = best_threshold(fitted.decision_function(x), y)
    found = fitted.decision_function(x_test) > threshold
    return float(2 * (found & y_test).sum() / max(1, found.sum() + y_test.sum()))


def _logistic_regression() -> Any:
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise UserError(
            "probes need scikit-learn: pip install 'sae-lens-route[concepts]', or leave out "
            "probe_sizes"
        ) from error
    return LogisticRegression(max_iter=1000)
