"""Which learning rate a method gets from its trials."""

from sae_lens_route.paper.learning_rates import best_learning_rates
from sae_lens_route.paper.methods import METHODS, RELU, ROUTE, TOPK
from sae_lens_route.paper.report import learning_rates_table
from sae_lens_route.paper.results import RateTrial

TRIALS = [
    RateTrial(ROUTE.label, 0.1, 0.3),
    RateTrial(ROUTE.label, 0.2, 0.25),
    RateTrial(ROUTE.label, 0.4, 0.5),
    RateTrial(TOPK.label, 0.1, 0.2),
    RateTrial(TOPK.label, 0.2, 0.21),
]


def test_the_rate_of_the_lowest_error_or_another_methods() -> None:
    others = [RateTrial(m.label, 0.7, 0.5) for m in METHODS if m not in (ROUTE, TOPK)]
    variants = [method.label for method in METHODS if method.is_difference]
    for trials in (TRIALS, TRIALS[::-1]):
        best = best_learning_rates([*trials, *others])
        assert {best[label] for label in (ROUTE.label, *variants)} == {0.2}
        assert best[TOPK.label] == best[RELU.label] == 0.1
        assert best.keys() == {method.label for method in METHODS}


def test_a_rate_is_taken_from_a_method_that_has_its_own() -> None:
    by_label = {method.label: method for method in METHODS}
    takers = [method for method in METHODS if method.rate_of is not None]
    assert takers and all(by_label[m.rate_of or ""].rate_of is None for m in takers)
    assert all(m.rate_of is not None for m in METHODS if m.first_penalty is not None)


def test_the_table_marks_it() -> None:
    assert learning_rates_table(TRIALS).splitlines()[2:] == [
        f"| {ROUTE.label} | 0.300 | **0.250** | 0.500 |",
        f"| {TOPK.label} | **0.200** | 0.210 | - |",
    ]
