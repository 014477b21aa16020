"""Intervals and gains against other computations."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from support.reproduction import row

from sae_lens_route.errors import UserError
from sae_lens_route.evals.comparison import SweepRow
from sae_lens_route.evals.evaluate import ContextMeans
from sae_lens_route.paper.statistics import at_shares, interval, metric_interval, routing_gain


def test_interval_is_students() -> None:
    values = [0.173, 0.177, 0.168]
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    found = interval(values)
    assert found.half_width is not None
    assert found.mean == pytest.approx(np.mean(values), rel=1e-12)
    assert found.mean - found.half_width == pytest.approx(low, rel=1e-9)
    assert found.mean + found.half_width == pytest.approx(high, rel=1e-9)


def test_one_seed_has_no_interval() -> None:
    assert interval([0.5]).half_width is None
    assert str(interval([0.5])) == "0.500"


def test_an_interval_is_shown_in_one_form() -> None:
    assert interval([-0.5, -0.5]).show("+.1%") == "-50.0% ± 0.0%"


def with_contexts(values: np.ndarray, seed: int, n_tokens: list[int] | None = None) -> SweepRow:
    n_tokens = n_tokens or [10] * len(values)
    means = ContextMeans(n_tokens, [0.0] * len(values), values.tolist())
    return replace(row(seed=seed, kl=float(np.average(values, weights=n_tokens))), by_context=means)


def test_an_interval_over_seeds_and_text_holds_both() -> None:
    """Equal seeds leave the text's interval, equal contexts that of the seeds."""
    values = np.repeat([1.0, 2.0, 4.0], 4)
    equal_seeds = metric_interval([with_contexts(values, seed) for seed in (0, 1)], "kl")
    low, high = stats.ttest_1samp([1.0, 2.0, 4.0], 0.0).confidence_interval(0.95)
    assert equal_seeds.mean == pytest.approx(7 / 3)
    assert equal_seeds.half_width == pytest.approx((high - low) / 2)
    rows = [with_contexts(np.full(12, mean), i) for i, mean in enumerate((1.0, 1.5))]
    assert metric_interval(rows, "kl") == pytest.approx(interval([1.0, 1.5]))
    assert metric_interval(rows[:1], "kl").half_width is None


def test_contexts_count_by_their_tokens() -> None:
    rows = [with_contexts(np.repeat([1.0, 3.0], 4), 0, [30] * 4 + [10] * 4) for _ in range(2)]
    found = metric_interval(rows, "kl")
    assert found.mean == pytest.approx(1.5)
    # sum of (share * deviation)^2 = (.75 * .5)^2 + (.25 * 1.5)^2, times 2 / 1
    half_width = stats.t.ppf(0.975, 1) * (2 * (0.375**2 + 0.375**2)) ** 0.5
    assert found.half_width == pytest.approx(half_width)


def test_the_interval_covers_the_mean_of_all_seeds_and_texts() -> None:
    """Three seeds, 80 contexts in documents of four: at least 95 % of 400 draws, to chance."""
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        of_seeds, of_documents = generator.normal(size=3), generator.normal(size=20)
        noise = generator.normal(size=(3, 80))
        values = 5 + 0.2 * of_seeds[:, None] + np.repeat(of_documents, 4) + noise
        found = metric_interval([with_contexts(v, i) for i, v in enumerate(values)], "kl")
        assert found.half_width is not None
        covered += abs(found.mean - 5) <= found.half_width
    assert 0.93 * 400 <= covered <= 0.995 * 400


def test_routing_gain_pairs_seeds() -> None:
    router = [row(seed=0, kl=0.9), row(seed=1, kl=0.6)]
    random = [row(seed=1, kl=1.0), row(seed=0, kl=2.0)]
    assert routing_gain(router, random, "kl").mean == pytest.approx((0.55 + 0.4) / 2)


def test_routing_gain_is_positive_where_the_router_is_better() -> None:
    router, random = row(norm_mse=0.1, kl=3.0), row(norm_mse=0.2, kl=2.0)
    assert routing_gain([router], [random], "norm_mse").mean == pytest.approx(0.5)
    assert routing_gain([router], [random], "kl").mean == pytest.approx(-0.5)


def test_routing_gain_needs_the_same_seeds() -> None:
    with pytest.raises(UserError, match=r"\[0\].*\[0, 1\]"):
        routing_gain([row(seed=0), row(seed=1)], [row(seed=0)], "kl")


def test_a_router_at_other_shares_weights_each_block() -> None:
    router = row(norm_mse_by_block={2: 0.1, 5: None, 9: 0.3}, kl_by_block={2: 1.0, 5: None, 9: 4.0})
    assert at_shares(router, {2: 0.5, 5: 0.0, 9: 0.5}, "norm_mse") == pytest.approx(0.2)
    assert at_shares(router, {2: 0.5, 5: 0.0, 9: 0.5}, "kl") == pytest.approx(2.5)


def test_a_router_without_tokens_at_a_block_has_no_mean_there() -> None:
    router = row(norm_mse_by_block={2: 0.1, 5: None, 9: 0.3})
    assert at_shares(router, {2: 0.5, 5: 0.1, 9: 0.4}, "norm_mse") is None
    assert at_shares(row(kl=None), {2: 1.0}, "kl") is None
