"""The paper's figures, drawn with plotly.

Every figure is written twice: as HTML that needs no network, and as SVG for documents. plotly needs
a browser to draw static images, so matplotlib draws the SVG from the same traces.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import plotly.graph_objects as go
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure as StaticFigure
from plotly.colors import qualitative

from sae_lens_route.evals.comparison import SweepRow
from sae_lens_route.evals.reconstruction import ReconstructionMetrics
from sae_lens_route.features.raters import Agreement

COLORS = qualitative.Safe
DASHES = ("solid", "dash", "dot", "dashdot")
_LINE_STYLES = dict(zip(DASHES, ("-", "--", ":", "-."), strict=True))  # as matplotlib writes them


class Span(NamedTuple):
    """A number with its interval."""

    mean: float
    low: float
    high: float


class TradeoffPoint(NamedTuple):
    """One run in a figure of a metric against sparsity."""

    label: str
    """Method; its points are joined by a line."""
    sparsity: tuple[Any, ...]
    """The settings that decide the sparsity; runs that share them are averaged."""
    l0: float
    """Active features per token."""
    value: float | None
    """The metric; None leaves the run out."""

    @classmethod
    def of(cls, row: SweepRow, value: float | None) -> TradeoffPoint:
        """A row of a sweep with one of its metrics, such as `row.kl`."""
        return cls(row.label, row.sparsity, row.l0, value)


class ThresholdCurve(NamedTuple):
    """A number of one run as a function of the activation threshold."""

    label: str
    """Method; curves that share it are averaged."""
    thresholds: list[float]
    values: list[float | None]
    """One for each threshold; None leaves the threshold out."""


class FeatureByBlock(NamedTuple):
    """How strongly a feature is active at each routed block."""

    kind: str
    """The group of features; each has a color."""
    feature: int
    activation_by_block: dict[int, float]
    """Mean activation by block."""


def routing_weights(metrics: Mapping[str, ReconstructionMetrics]) -> go.Figure:
    """Share of the tokens routed to each block, and its mean route probability (paper, Figure 9).

    Args:
        metrics: Evaluations by the name of their router, or of their text.
    """
    figure = _figure("Routing weights", "block", "share of tokens, mean probability")
    for i, (name, result) in enumerate(metrics.items()):
        _add_bars(figure, result.share_by_block, f"share, {name}", i)
    for i, (name, result) in enumerate(metrics.items()):
        blocks = [str(block) for block in result.mean_probs_by_block]
        y = list(result.mean_probs_by_block.values())
        _add_line(figure, blocks, y, f"mean p, {name}", i, "dot")
    figure.update_xaxes(type="category")
    return figure


def training_curves(records: Mapping[str, Sequence[Mapping[str, Any]]]) -> go.Figure:
    """Loss over tokens, from the lines of `train_log.jsonl` by SAE."""
    figure = _figure("Training", "tokens", "loss")
    for i, (name, of_sae) in enumerate(records.items()):
        tokens, losses = ([record[field] for record in of_sae] for field in ("tokens", "loss"))
        _add_line(figure, tokens, losses, name, i, mode="lines")
    return figure


def tradeoff(points: Sequence[TradeoffPoint], y_title: str) -> go.Figure:
    """A metric against L0, a line per label through the means over seeds (Figures 4, 6, 8, 12).

    Where several runs are averaged, each is a small point next to the line.

    Args:
        points: Runs of one label and one sparsity differ only in their seed.
        y_title: Name and unit of the metric.
    """
    figure = _figure(f"{y_title} against sparsity", "L0, active features per token", y_title)
    known = [point for point in points if point.value is not None]
    for i, (label, runs) in enumerate(_by_label(known).items()):
        by_sparsity: dict[tuple[Any, ...], list[tuple[float, ...]]] = defaultdict(list)
        for run in runs:
            by_sparsity[run.sparsity].append((run.l0, cast(float, run.value)))
        means = sorted(tuple(map(_mean, zip(*at, strict=True))) for at in by_sparsity.values())
        l0, values = zip(*means, strict=True)
        _add_line(figure, l0, values, label, i)
        if len(runs) > len(means):
            figure.add_scatter(
                x=[run.l0 for run in runs],
                y=[run.value for run in runs],
                mode="markers",
                line={"color": _color(i)},
                marker={"color": _color(i), "size": 4},
                showlegend=False,
            )
    return figure


def routing_shares(shares: Mapping[str, Sequence[Mapping[int, float]]]) -> go.Figure:
    """Share of the tokens at each block, a bar per method, mean over its runs (Figure 9).

    Args:
        shares: For each method, one mapping from block to share per run.
    """
    figure = _figure("Share of the tokens", "block", "share of tokens")
    for i, (label, runs) in enumerate(shares.items()):
        _add_bars(figure, {b: _mean([run[b] for run in runs]) for b in runs[0]}, label, i)
    figure.update_xaxes(type="category")
    return figure


def threshold_curves(curves: Sequence[ThresholdCurve], y_title: str) -> go.Figure:
    """Interpretable features, or their score, against the threshold, a line per label (Figure 5).

    Args:
        curves: One for each run.
        y_title: Name of the values.
    """
    figure = _figure(f"{y_title} above a threshold", "threshold", y_title)
    for i, (label, runs) in enumerate(_by_label(curves).items()):
        by_threshold: dict[float, list[float]] = defaultdict(list)
        for run in runs:
            for threshold, value in zip(run.thresholds, run.values, strict=True):
                if value is not None:
                    by_threshold[threshold].append(value)
        points = sorted((at, _mean(values)) for at, values in by_threshold.items())
        _add_line(figure, [x for x, _ in points], [y for _, y in points], label, i)
    return figure


def feature_profiles(profiles: Sequence[FeatureByBlock]) -> go.Figure:
    """Mean activation of a few features by block, relative to their largest (Figure 1)."""
    figure = _figure("Activation by block", "block", "share of the largest")
    kinds = list(dict.fromkeys(profile.kind for profile in profiles))
    for profile in profiles:
        activations = profile.activation_by_block
        largest = max(*activations.values(), 1e-12)
        kind = kinds.index(profile.kind)
        y = [value / largest for value in activations.values()]
        name, dash = f"{profile.kind} {profile.feature}", ("solid", "dot", "dash")[kind % 3]
        _add_line(figure, list(activations), y, name, kind, dash)
    return figure


def judge_agreement(result: Agreement, names: tuple[str, str]) -> go.Figure:
    """How many features each of two judges gave every score (paper, Figure 7).

    Args:
        result: The comparison; its shares stand in the title.
        names: Of the first judge and the second.
    """
    title = f"{result.n} features scored by two judges"
    if result.exact is not None and result.within_one is not None:
        title += f": {result.exact:.0%} equal, {result.within_one:.0%} within one"
    figure = _figure(title, "score", "features")
    first, second = result.counts, zip(*result.counts, strict=True)
    totals = [[sum(row) for row in rows] for rows in (first, second)]
    for i, (name, counts) in enumerate(zip(names, totals, strict=True)):
        _add_bars(figure, {score: float(n) for score, n in enumerate(counts, 1)}, name, i)
    figure.update_xaxes(type="category")
    return figure


def concept_recovery(
    methods: Mapping[str, Mapping[str, Span]], chance: Mapping[str, float]
) -> go.Figure:
    """Mean F1 of the best single features by level of the concepts.

    Args:
        methods: By method, the F1 at each level.
        chance: The F1 at each level with permuted labels.
    """
    figure = _figure("Concepts recovered by single features", "level of the concepts", "mean F1")
    for i, (name, by_level) in enumerate(methods.items()):
        _add_bars(figure, {level: span.mean for level, span in by_level.items()}, name, i)
        figure.data[-1].error_y = _interval(list(by_level.values()))
    y = list(chance.values())
    _add_line(figure, list(chance), y, "permuted labels", len(methods), mode="markers")
    figure.update_xaxes(type="category")
    return figure


def concept_recovery_by_block(
    level: str, single_layers: Mapping[int, Span], others: Mapping[str, Span]
) -> go.Figure:
    """Mean F1 of one level: single layers as a curve over blocks, others as horizontal lines.

    Args:
        level: Name of the level, for the title.
        single_layers: F1 of a dictionary at each block.
        others: F1 of dictionaries that read several blocks.
    """
    figure = _figure(f"Concepts recovered by single features: {level}", "block", "mean F1")
    blocks, spans = list(single_layers), list(single_layers.values())
    _add_line(figure, blocks, [span.mean for span in spans], "single layer", 0)
    figure.data[-1].error_y = _interval(spans)
    for i, (name, span) in enumerate(others.items(), start=1):
        y = [span.mean] * 2
        _add_line(figure, [blocks[0], blocks[-1]], y, name, i, DASHES[i % len(DASHES)], "lines")
    return figure


def concept_depth(methods: Mapping[str, Mapping[str, float]]) -> go.Figure:
    """The mean block where the features of recovered concepts live, by level (Figure 1).

    Args:
        methods: By method, the mean block at each level that has recovered concepts.
    """
    figure = _figure("Where recovered concepts live", "level of the concepts", "mean block")
    for i, (name, by_level) in enumerate(methods.items()):
        y = list(by_level.values())
        _add_line(figure, list(by_level), y, name, i, DASHES[i % len(DASHES)])
    figure.update_xaxes(type="category")
    return figure


def recovery_by_depth(methods: Mapping[str, Mapping[str, Span]]) -> go.Figure:
    """Share of the known features of synthetic streams that each method recovers.

    Args:
        methods: By method, the share of each depth class.
    """
    figure = _figure("Known features recovered", "blocks where the features are", "share recovered")
    for i, (name, by_depth) in enumerate(methods.items()):
        _add_bars(figure, {depth: span.mean for depth, span in by_depth.items()}, name, i)
        figure.data[-1].error_y = _interval(list(by_depth.values()))
    figure.update_xaxes(type="category")
    return figure


def _interval(spans: Sequence[Span]) -> dict[str, Any]:
    """Error bars in plotly's form."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(0.0, span.high - span.mean) for span in spans],
        "arrayminus": [max(0.0, span.mean - span.low) for span in spans],
        "color": "rgb(76,76,76)",
    }


Labeled = TypeVar("Labeled", TradeoffPoint, ThresholdCurve)


def _by_label(runs: Sequence[Labeled]) -> dict[str, list[Labeled]]:
    groups: dict[str, list[Labeled]] = defaultdict(list)
    for run in runs:
        groups[run.label].append(run)
    return groups


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def _figure(title: str, x_title: str, y_title: str) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        title=title,
        xaxis_title=x_title,
        yaxis_title=y_title,
        template="plotly_white",
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.0, "xanchor": "right", "x": 1.0},
    )
    return figure


def _add_bars(figure: go.Figure, by_group: Mapping[Any, float], name: str, index: int) -> None:
    groups, values = [str(group) for group in by_group], list(by_group.values())
    figure.add_bar(x=groups, y=values, name=name, marker={"color": _color(index)})


def _add_line(
    figure: go.Figure,
    x: Sequence[Any],
    y: Sequence[float],
    name: str,
    color: int,
    dash: str | None = None,
    mode: str = "lines+markers",
) -> None:
    line = {"color": _color(color), "dash": dash}
    figure.add_scatter(x=x, y=y, name=name, mode=mode, line=line)


def write_figure(figure: go.Figure, path: str | Path) -> list[Path]:
    """Write `path`.html, self-contained, and `path`.svg.

    Returns:
        Both paths.
    """
    stem = Path(path)
    stem.parent.mkdir(parents=True, exist_ok=True)
    html, svg = stem.with_suffix(".html"), stem.with_suffix(".svg")
    figure.write_html(html, include_plotlyjs=True, full_html=True)
    with rc_context({"svg.hashsalt": stem.name}):  # the same figure gives the same bytes
        _static(figure).savefig(svg, bbox_inches="tight", metadata={"Date": None})
    return [html, svg]


def _static(figure: go.Figure) -> StaticFigure:
    """The bar and scatter traces of a plotly figure on one pair of matplotlib axes."""
    static = StaticFigure(figsize=(8, 4.5))
    axes = static.add_subplot()
    traces = cast(tuple[Any, ...], figure.data)
    bars = [trace for trace in traces if trace.type == "bar"]
    categories: list[Any] = list(dict.fromkeys(x for trace in bars for x in trace.x))
    for i, trace in enumerate(bars):
        width = 0.8 / len(bars)
        at = [categories.index(x) + (i + 0.5) * width - 0.4 for x in trace.x]
        axes.bar(at, trace.y, width, label=trace.name, color=_rgb(trace.marker.color))
        _draw_errors(axes, at, trace)
    for trace in traces:
        if trace.type == "scatter":
            at = [categories.index(x) for x in trace.x] if categories else trace.x
            dash = _LINE_STYLES[trace.line.dash or "solid"]
            axes.plot(
                at,
                trace.y,
                linestyle=dash if "lines" in trace.mode else "none",
                marker="o" if "markers" in trace.mode else None,
                markersize=trace.marker.size,
                label=trace.name if trace.showlegend is not False else "_unlisted",
                color=_rgb(trace.line.color),
            )
            _draw_errors(axes, at, trace)
    if categories:
        axes.set_xticks(range(len(categories)), [str(c) for c in categories])
    layout = figure.layout
    axes.set_title(layout.title.text or "")
    axes.set_xlabel(layout.xaxis.title.text or "")
    axes.set_ylabel(layout.yaxis.title.text or "")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))  # next to the axes
    return static


def _draw_errors(axes: Axes, at: Sequence[Any], trace: Any) -> None:
    error = trace.error_y
    if error.array is not None:
        span = [error.arrayminus, error.array]
        axes.errorbar(at, trace.y, span, fmt="none", ecolor="0.3", elinewidth=1)


def _rgb(color: str) -> tuple[float, ...]:
    """Red, green and blue from 0 to 1, as matplotlib takes them, of `rgb(136, 204, 238)`."""
    return tuple(int(part) / 255 for part in color.removeprefix("rgb(").rstrip(")").split(","))
