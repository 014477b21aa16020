"""The paper's figures from a reproduction, each as HTML and SVG."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import plotly.graph_objects as go

from sae_lens_route.evals.comparison import SweepRow
from sae_lens_route.paper.methods import ROUTE, shown_in
from sae_lens_route.paper.results import FeatureCounts, ReproductionResult, of_method
from sae_lens_route.plots import (
    FeatureByBlock,
    ThresholdCurve,
    TradeoffPoint,
    feature_profiles,
    routing_shares,
    threshold_curves,
    tradeoff,
    write_figure,
)


def figures(result: ReproductionResult) -> dict[str, go.Figure]:
    """Every figure by the name of its files."""
    shown = [
        curve
        for method in shown_in("sparsity")
        for curve in _n_features(method.label, of_method(result.features.counts, method, "main"))
    ]
    route = [(f"k {each.run.k}", [counts]) for each, counts in result.at_sparsities(ROUTE)]
    route_features = [curve for label, runs in route for curve in _n_features(label, runs)]
    route_scores = [
        ThresholdCurve(label, counts.thresholds, counts.surface_scores)
        for label, runs in route
        for counts in runs
    ]
    return {
        "tradeoff_kl": _tradeoff(result, lambda row, _: row.kl, "KL, nats per token"),
        "tradeoff_norm_mse": _tradeoff(result, lambda row, _: row.norm_mse, "NormMSE"),
        "features_by_sparsity": _tradeoff(
            result, lambda _, counts: float(counts.n_read), "Interpretable features"
        ),
        **_scores_by_sparsity(result),
        "features_by_threshold": threshold_curves(shown, "Interpretable features"),
        "route_features_by_threshold": threshold_curves(route_features, "Interpretable features"),
        "route_scores_by_threshold": threshold_curves(route_scores, "Surface score"),
        "routing_shares": _shares(result),
        "routing_shares_training": _training_shares(result),
        "features_by_block": feature_profiles(
            [
                FeatureByBlock(shown.kind, shown.profile.feature, shown.activation_by_block)
                for shown in result.features.shown
            ]
        ),
    }


def _scores_by_sparsity(result: ReproductionResult) -> dict[str, go.Figure]:
    """The judge's scores, if one was asked, and the surface scores: never in one figure."""
    surface = _tradeoff(result, lambda _, counts: counts.surface_score, "Surface score")
    if all(counts.judge_score is None for counts in result.features.counts):
        return {"scores_by_sparsity": surface}
    judge = _tradeoff(result, lambda _, counts: counts.judge_score, "Judge's score")
    return {"scores_by_sparsity": surface, "judge_scores_by_sparsity": judge}


def write_figures(result: ReproductionResult, folder: Path) -> list[Path]:
    """Write all figures into a folder; returns their paths."""
    return [
        path
        for name, figure in figures(result).items()
        for path in write_figure(figure, folder / name)
    ]


def _n_features(label: str, runs: list[FeatureCounts]) -> list[ThresholdCurve]:
    return [
        ThresholdCurve(label, counts.thresholds, list(map(float, counts.n_features)))
        for counts in runs
    ]


def _tradeoff(
    result: ReproductionResult,
    value: Callable[[SweepRow, FeatureCounts], float | None],
    y_title: str,
) -> go.Figure:
    """A value against L0 for the methods traded over sparsities."""
    points = [
        TradeoffPoint(method.label, (trained.run.k,), trained.row.l0, value(trained.row, counts))
        for method in shown_in("sparsity")
        for trained, counts in result.at_sparsities(method)
    ]
    return tradeoff(points, y_title)


def _shares(result: ReproductionResult) -> go.Figure:
    return routing_shares(
        {
            method.label: [
                each.row.share_by_block or {} for each in of_method(result.trained, method, "main")
            ]
            for method in shown_in("routers")
        }
    )


def _training_shares(result: ReproductionResult) -> go.Figure:
    return routing_shares(
        {
            method.label: [
                shares.share_by_block
                for shares in of_method(result.training_shares, method, "main")
            ]
            for method in shown_in("routers")
            if method.has_twin
        }
    )
