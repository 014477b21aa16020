"""Means over seeds and text with their intervals, and comparisons of routers with each other.

`routing_gain` compares a router with a random one of the same shares; `at_shares` reweights a
router's per-block means, so that routers with different shares can be compared.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

from sae_lens_route.errors import UserError
from sae_lens_route.evals.comparison import SweepRow
from sae_lens_route.plots import Span

Metric = Literal["norm_mse", "kl"]


class Interval(NamedTuple):
    """A mean over seeds with its 95 % t-interval; without an interval for a single seed."""

    mean: float
    half_width: float | None

    def __str__(self) -> str:
        return self.show()

    def show(self, form: str = ".3f") -> str:
        """As text: mean ± half width."""
        half = "" if self.half_width is None else f" ± {self.half_width:{form.lstrip('+')}}"
        return f"{self.mean:{form}}{half}"

    @property
    def span(self) -> Span:
        """As figures take it; without width for a single value."""
        half = self.half_width or 0.0
        return Span(self.mean, self.mean - half, self.mean + half)


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval of a few independent values, by Student's t."""
    if len(values) < 2:
        return Interval(float(values[0]), None)
    spread = statistics.stdev(values) / len(values) ** 0.5
    return Interval(statistics.fmean(values), float(stats.t.ppf(0.975, len(values) - 1)) * spread)


def over_seeds(values: Iterable[float | None], form: str = ".3f") -> str:
    """Mean ± half width of the known values, as text; a dash without any."""
    known = [float(value) for value in values if value is not None]
    return interval(known).show(form) if known else "-"


_BLOCK = 4
"""Consecutive contexts that count as one: those of one document are not independent."""


def metric_interval(rows: Sequence[SweepRow], metric: Metric) -> Interval:
    """Mean of a metric over the seeds of a method, with its 95 % interval over seeds and text.

    Without means by context, or with a single seed, `interval`.

    Args:
        rows: Of one method, evaluated on the same text.
        metric: What to average.

    Raises:
        UserError: a row lacks the metric.
    """
    means = interval([metric_of(row, metric) for row in rows])
    by_context = [row.by_context for row in rows if row.by_context is not None]
    if means.half_width is None or len(by_context) < len(rows):
        return means
    values = np.array([getattr(each, metric) for each in by_context]).mean(0)
    over_text = text_half_width(values, np.array(by_context[0].n_tokens, dtype=float))
    return Interval(means.mean, math.hypot(means.half_width, over_text))


def text_half_width(
    values: Float[np.ndarray, " contexts"], weights: Float[np.ndarray, " contexts"]
) -> float:
    """Half of the 95 % t-interval of a weighted mean over contexts, by blocks of four.

    Args:
        values: Mean of each context, over seeds.
        weights: Tokens of each context.
    """
    block = np.arange(len(values)) // _BLOCK
    weight = np.bincount(block, weights)
    mean = np.bincount(block, weights * values) / weight
    n, share = len(mean), weight / weight.sum()
    if n < 2:
        return 0.0
    variance = n / (n - 1) * (share**2 * (mean - share @ mean) ** 2).sum()
    return float(stats.t.ppf(0.975, n - 1) * variance**0.5)


def metric_of(row: SweepRow, metric: Metric) -> float:
    """NormMSE, or KL in nats per token.

    Raises:
        UserError: the row has no KL, as under soft routing.
    """
    value = row.norm_mse if metric == "norm_mse" else row.kl
    if value is None:
        raise UserError(f"{row.name!r} has no {metric}: it was not spliced into the model")
    return value


def routing_gain(
    router: Sequence[SweepRow], random: Sequence[SweepRow], metric: Metric
) -> Interval:
    """How much lower a metric is with a router than with a random one of the same shares.

    1 - router / random for each seed: both dictionaries are trained on their own partition, so the
    difference is due to the partition itself. Shares alone, which decide how hard the blocks are,
    cancel.

    Args:
        router: Rows of a sweep for one router.
        random: The rows of its share-matched random routers, with the same seeds.
        metric: The metric to compare.

    Raises:
        UserError: the seeds differ, or a row lacks the metric.
    """
    by_seed = {row.seed: metric_of(row, metric) for row in random}
    seeds = sorted(row.seed for row in router)
    if sorted(by_seed) != seeds:
        raise UserError(f"the random routers have seeds {sorted(by_seed)}, the router {seeds}")
    return interval([1 - metric_of(row, metric) / by_seed[row.seed] for row in router])


def at_shares(row: SweepRow, shares: Mapping[int, float], metric: Metric) -> float | None:
    """Reweight one router's per-block means by another router's shares.

    Args:
        row: The router's row of a sweep.
        shares: The other router's share of the tokens at each block.
        metric: The metric to reweight.

    Returns:
        The reweighted mean; None if the router sends no tokens to a block that has a share.
    """
    by_block = _metric_by_block(row, metric)
    total = 0.0
    for block, share in shares.items():
        value = by_block.get(block)
        if value is None and share > 0:
            return None
        total += (value or 0.0) * share
    return total


def _metric_by_block(row: SweepRow, metric: Metric) -> Mapping[int, float | None]:
    if metric == "norm_mse":
        return row.reconstruction.norm_mse_by_block
    return {} if row.downstream is None else row.downstream.kl_by_block
