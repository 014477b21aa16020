"""The figures of a hand-made reproduction show the right numbers, at the right blocks."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
from support.reproduction import OTHER_K, K, made_result

from sae_lens_route.paper.figures import figures, write_figures
from sae_lens_route.paper.methods import ROUTE, SOFT, TOPK, shown_in
from sae_lens_route.paper.plan import Run
from sae_lens_route.paper.results import ReproductionResult
from sae_lens_route.records import plain, typed

RESULT = made_result(
    {
        Run(TOPK.label, OTHER_K, 0, "sparsity"): {"l0": 8.0, "norm_mse": 0.5, "kl": 3.0},
        Run(TOPK.label, K, 0): {"l0": 16.0, "norm_mse": 0.25, "kl": 2.0},
    },
    {
        Run(TOPK.label, K, 0): {"n_features": [9, 8, 7, 6, 5, 4], "judge_score": 4.5},
        Run(TOPK.label, K, 1): {"n_features": [19, 18, 17, 16, 15, 14]},
        Run(ROUTE.label, OTHER_K, 0, "sparsity"): {
            "surface_scores": [0.5, 0.6, 0.7, None, 0.8, None]
        },
    },
)


def traces(name: str) -> list[Any]:
    return list(cast(Any, figures(RESULT)[name]).data)


def trace(name: str, label: str) -> Any:
    (found,) = [each for each in traces(name) if each.name == label]
    return found


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("tradeoff_kl", [3.0, 2.0]),
        ("tradeoff_norm_mse", [0.5, 0.25]),
        ("features_by_sparsity", [40, 7]),
        ("scores_by_sparsity", [0.7, 0.7]),
    ],
)
def test_a_value_against_l0(name: str, values: list[float]) -> None:
    assert list(trace(name, TOPK.label).x) == [8.0, 16.0]
    assert list(trace(name, TOPK.label).y) == values


def test_figures_over_sparsity_show_the_methods_of_that_table_in_order() -> None:
    names = [each.name for each in traces("tradeoff_kl")]
    assert names == [method.label for method in shown_in("sparsity")]
    assert SOFT.label not in names


def test_features_by_threshold_are_means_over_seeds() -> None:
    assert list(trace("features_by_threshold", TOPK.label).y) == [14, 13, 12, 11, 10, 9]
    assert list(trace("features_by_threshold", TOPK.label).x)[:2] == pytest.approx([0.8, 1.2])


def test_the_routesae_alone_has_a_line_per_sparsity() -> None:
    assert [each.name for each in traces("route_features_by_threshold")] == ["k 8", "k 16"]
    scores = trace("route_scores_by_threshold", "k 8")
    assert list(scores.y) == [0.5, 0.6, 0.7, 0.8]  # thresholds without features are left out


def test_bars_stand_at_blocks() -> None:
    shares, training = traces("routing_shares"), traces("routing_shares_training")
    assert [bar.name for bar in shares] == [method.label for method in shown_in("routers")]
    assert list(shares[0].x) == ["2", "5", "9"]
    assert list(shares[0].y) == [0.5, 0.25, 0.25]
    assert len(training) == len(shares) - 1  # the uniform router is not trained
    assert list(training[0].y) == [0.125, 0.25, 0.625]


def test_features_are_drawn_over_blocks() -> None:
    (feature,) = traces("features_by_block")
    assert feature.name == "pattern 7"
    assert list(feature.x) == [2, 5, 9]
    assert list(feature.y) == pytest.approx([2 / 9, 5 / 9, 1])


def test_figures_are_drawn_from_the_file_alone(tmp_path: Path) -> None:
    again = typed(ReproductionResult, json.loads(json.dumps(plain(RESULT))))
    written = write_figures(again, tmp_path)
    assert {path.stem for path in written} == set(figures(RESULT))
    assert {path.suffix for path in written} == {".html", ".svg"}
    assert all(path.exists() for path in written)
