"""The features that a reader should look at first.

1. A feature is *dense* if it is active on more than 10 % of the kept tokens. Such a feature tells
   little about a token, and dense features are often those with the largest activations.
2. A feature's *peak* is its largest activation over its mean activation where it is active. Where
   the peak is high, the strongest contexts stand out from all others, and so show what it is for.
3. Features that are not dense and active on at least 16 tokens come first, then features active on
   fewer, then dense ones; within each group, by falling peak.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from sae_lens_route.errors import UserError
from sae_lens_route.evals.reconstruction import DENSE_SHARE
from sae_lens_route.features.table import FeatureTable

MIN_FIRED = 16
"""Tokens that a feature needs to be active on for its peak to say something."""

SUMMARIZED = 10
"""Features in the summary of a table."""


def reading_order(
    n_fired: Int[np.ndarray, " n"],
    density: Float[np.ndarray, " n"],
    max_activation: Float[np.ndarray, " n"],
    mean_activation: Float[np.ndarray, " n"],
) -> Int[np.ndarray, " n"]:
    """Indices of features that have fired, the one to look at first in front."""
    group = np.where(density > DENSE_SHARE, 2, n_fired < MIN_FIRED)
    return np.lexsort((-max_activation / mean_activation, group))


def features_to_show(table: FeatureTable, n: int) -> list[int]:
    """The `n` interpretable features to look at first.

    Raises:
        UserError: the table has no interpretable features.
    """
    if not table.interpretable:
        raise UserError("feature_table has no interpretable features: name some with features")
    rows = table.features.take(table.interpretable)
    names = ("n_fired", "density", "max_activation", "mean_activation")
    order = reading_order(*(rows[name].to_numpy() for name in names))
    return np.array(table.interpretable)[order[:n]].tolist()


def n_dense(table: FeatureTable) -> int:
    """Number of dense features."""
    return int((table.features["density"].to_numpy() > DENSE_SHARE).sum())


def summary(table: FeatureTable) -> str:
    """Counts of a table's features, and the features to look at first, as text for a terminal."""
    run = table.run
    lines = [
        *(
            f"threshold {at.threshold:.3f}: {at.n_features} interpretable features"
            for at in run.counts
        ),
        f"{n_dense(table)} dense features, active on more than {DENSE_SHARE:.0%} of the tokens",
    ]
    if not table.interpretable:
        return "\n".join(lines)
    lines += ["", f"activations in units of {run.options.units}; the features to look at first:"]
    lines.append("feature  density    max   mean  block  fires on")
    for feature in features_to_show(table, SUMMARIZED):
        of = table.profile(feature)
        tokens = list(dict.fromkeys(context.token for context in table.contexts_of(feature)))
        lines.append(
            f"{feature:7}  {of.density:7.2%}  {of.max_activation:5.2f}  {of.mean_activation:5.2f}"
            f"  {of.mean_block:5.1f}  {' '.join(map(repr, tokens[:4]))}"
        )
    return "\n".join(lines)
