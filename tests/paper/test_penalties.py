"""The search for penalties: interpolation, where it looks next, and short runs of a real model."""

import pytest

from sae_lens_route.paper.penalties import Trial, next_penalties, penalty_at


def trials(*pairs: tuple[float, float]) -> list[Trial]:
    return [Trial("ReLU", penalty, l0) for penalty, l0 in pairs]


def power_law(penalty: float) -> tuple[float, float]:
    return penalty, 5 * penalty**-0.5


@pytest.mark.parametrize("l0", [1.5, 5.0, 11.0, 25.0])
def test_a_power_law_is_inverted_exactly_also_outside_the_trials(l0: float) -> None:
    found = penalty_at(trials(*map(power_law, (0.1, 4.0, 1.0, 0.4))), l0)
    assert found == pytest.approx((5 / l0) ** 2, rel=1e-12)


def test_between_two_trials_only_they_count() -> None:
    """A kink elsewhere has no influence: halfway in the logarithms of 20 and 5 is 10."""
    found = penalty_at(trials((1.0, 20.0), (4.0, 5.0), (8.0, 4.9), (100.0, 0.0)), 10.0)
    assert found == pytest.approx(2.0)


def test_trials_that_hardly_differ_do_not_lead_far() -> None:
    assert penalty_at(trials((1.0, 0.0), (4.0, 0.0)), 10.0) == pytest.approx(1.0)
    assert penalty_at(trials((1.0, 62.8), (4.0, 62.7)), 8.0) == pytest.approx(12.0)
    assert penalty_at(trials((1.0, 8.0), (4.0, 7.9)), 60.0) == pytest.approx(1 / 3)


def test_the_search_goes_on_where_the_wanted_l0_are_not_yet_between() -> None:
    found = trials((1.0, 20.0), (4.0, 10.0))
    assert next_penalties(found, [12, 16]) == []
    assert next_penalties(found, [12, 32]) == [pytest.approx(1 / 3)]
    assert next_penalties(found, [8, 16]) == [12.0]
    assert next_penalties(found, [8, 32]) == [pytest.approx(1 / 3), 12.0]
