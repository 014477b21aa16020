"""Intervals and gains against other computations."""

import numpy as np
import pytest
from scipy import stats
from support.reproduction import row

from sae_lens_route.errors import UserError
from sae_lens_route.paper.statistics import at_shares, interval, routing_gain


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
