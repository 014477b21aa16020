"""The paper's figures, drawn with plotly.

Every figure is written twice: as HTML that needs no network, and as SVG for documents. plotly draws
static images only through a browser, which a fresh machine has not, so the SVG is drawn by
matplotlib from the same traces.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

import plotly.graph_objects as go
from matplotlib import rc_context
from matplotlib.figure import Figure as StaticFigure
from plotly.colors import qualitative

from sae_lens_route.evals import ReconstructionMetrics

COLORS = qualitative.Safe


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


def routing_weights(metrics: dict[str, ReconstructionMetrics], blocks: list[int]) -> go.Figure:
    """Share of the tokens sent to each block, and the mean route probability (paper, Figure 9).

    Args:
        metrics: Evaluations by the name of their text, such as "train" and "held-out".
        blocks: The routed blocks, in order.
    """
    figure = _figure("Routing weights", "block", "share of tokens, mean probability")
    labels = [str(block) for block in blocks]
    for i, (name, result) in enumerate(metrics.items()):
        figure.add_bar(x=labels, y=result.share, name=f"share, {name}", marker={"color": _color(i)})
    for i, (name, result) in enumerate(metrics.items()):
        figure.add_scatter(
            x=labels,
            y=result.mean_probs,
            name=f"mean p, {name}",
            mode="lines+markers",
            line={"color": _color(i), "dash": "dot"},
        )
    figure.update_xaxes(type="category")
    return figure


def training_curve(records: list[dict[str, Any]]) -> go.Figure:
    """Loss over tokens, from the lines of `train_log.jsonl`."""
    figure = _figure("Training", "tokens", "loss")
    figure.add_scatter(
        x=[r["tokens"] for r in records],
        y=[r["loss"] for r in records],
        name="loss",
        mode="lines",
        line={"color": _color(0)},
    )
    return figure


_SPARSITY = ("k", "l1_coefficient", "l0_coefficient", "target_l0")
_METRIC_TITLES = {
    "norm_mse": "NormMSE",
    "kl": "KL, nats per token",
    "n_features": "Interpretable features",
    "score": "Score",
}


def tradeoff(rows: list[dict[str, Any]], metric: str) -> go.Figure:
    """A metric against L0, a line per label through the means over seeds (Figures 4, 6, 8, 12).

    Every run is a small point of its own beside the line.

    Args:
        rows: Rows of a sweep; runs of one label and one sparsity differ only in their seed.
        metric: "norm_mse", "kl" or any other column; runs without it (KL under soft routing) are
            left out.
    """
    title = _METRIC_TITLES.get(metric, metric)
    figure = _figure(f"{title} against sparsity", "L0, active features per token", title)
    rows = [row for row in rows if row.get(metric) is not None]
    for i, label in enumerate(dict.fromkeys(row["label"] for row in rows)):
        own = [row for row in rows if row["label"] == label]
        by_sparsity: dict[Any, list[dict[str, Any]]] = {}
        for row in own:
            by_sparsity.setdefault(tuple(map(row.get, _SPARSITY)), []).append(row)
        means = sorted(
            tuple(sum(row[column] for row in runs) / len(runs) for column in ("l0", metric))
            for runs in by_sparsity.values()
        )
        l0, values = zip(*means, strict=True)
        line = {"color": _color(i)}
        figure.add_scatter(x=l0, y=values, name=label, mode="lines+markers", line=line)
        if len(own) > len(means):
            figure.add_scatter(
                x=[row["l0"] for row in own],
                y=[row[metric] for row in own],
                mode="markers",
                line=line,
                marker={"color": _color(i), "size": 4},
                showlegend=False,
            )
    return figure


def routing_shares(methods: dict[str, list[dict[str, Any]]], blocks: list[int]) -> go.Figure:
    """Share of the tokens at each block, a bar per method, mean over its runs (Figure 9).

    Args:
        methods: Rows of a sweep by label; each has `share`.
        blocks: The routed blocks, in order.
    """
    figure = _figure("Share of the tokens", "block", "share of tokens")
    for i, (label, rows) in enumerate(methods.items()):
        shares = [sum(row["share"][at] for row in rows) / len(rows) for at in range(len(blocks))]
        figure.add_bar(
            x=[str(block) for block in blocks], y=shares, name=label, marker={"color": _color(i)}
        )
    figure.update_xaxes(type="category")
    return figure


def threshold_curves(
    rows: list[dict[str, Any]], column: Literal["n_features", "offline_scores"]
) -> go.Figure:
    """Interpretable features, or their score, against the threshold, a line per label (Figure 5).

    Args:
        rows: Runs with `label`, `thresholds` and the column, a list over thresholds; runs of one
            label are averaged, and a threshold without a value is left out.
        column: What to draw.
    """
    title = "Interpretable features" if column == "n_features" else "Offline score"
    figure = _figure(f"{title} above a threshold", "threshold", title)
    for i, label in enumerate(dict.fromkeys(row["label"] for row in rows)):
        own = [row for row in rows if row["label"] == label]
        points = []
        for at, threshold in enumerate(own[0]["thresholds"]):
            known = [row[column][at] for row in own if row[column][at] is not None]
            if known:
                points.append((threshold, sum(known) / len(known)))
        figure.add_scatter(
            x=[x for x, _ in points],
            y=[y for _, y in points],
            name=label,
            mode="lines+markers",
            line={"color": _color(i)},
        )
    return figure


def feature_profiles(features: list[dict[str, Any]], blocks: list[int]) -> go.Figure:
    """Mean activation of a few features by block, relative to their largest (Figure 1).

    Args:
        features: Each with `kind`, `feature` and `activation_by_layer`.
        blocks: The routed blocks, in order.
    """
    figure = _figure("Activation by block", "block", "share of the largest")
    kinds = list(dict.fromkeys(shown["kind"] for shown in features))
    for shown in features:
        top = max(*shown["activation_by_layer"], 1e-12)
        kind = kinds.index(shown["kind"])
        figure.add_scatter(
            x=blocks,
            y=[value / top for value in shown["activation_by_layer"]],
            name=f"{shown['kind']} {shown['feature']}",
            mode="lines+markers",
            line={"color": _color(kind), "dash": ("solid", "dot", "dash")[kind % 3]},
        )
    return figure


def write_figure(figure: go.Figure, path: str | Path) -> list[Path]:
    """Write `path`.html, self-contained, and `path`.svg; gives back both paths."""
    stem = Path(path)
    stem.parent.mkdir(parents=True, exist_ok=True)
    html, svg = stem.with_suffix(".html"), stem.with_suffix(".svg")
    figure.write_html(html, include_plotlyjs=True, full_html=True)
    with rc_context({"svg.hashsalt": stem.name}):  # the same figure gives the same file
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
    for trace in traces:
        if trace.type == "scatter":
            at = [categories.index(x) for x in trace.x] if categories else trace.x
            dash = {"dot": ":", "dash": "--"}.get(trace.line.dash or "", "-")
            axes.plot(
                at,
                trace.y,
                linestyle=dash if "lines" in trace.mode else "none",
                marker="o" if "markers" in trace.mode else None,
                markersize=trace.marker.size,
                label=trace.name if trace.showlegend is not False else "_unlisted",
                color=_rgb(trace.line.color),
            )
    if categories:
        axes.set_xticks(range(len(categories)), [str(c) for c in categories])
    layout = figure.layout
    axes.set_title(layout.title.text or "")
    axes.set_xlabel(layout.xaxis.title.text or "")
    axes.set_ylabel(layout.yaxis.title.text or "")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))  # beside the lines
    return static


def _rgb(color: str) -> tuple[float, ...]:
    """`rgb(136, 204, 238)` as matplotlib wants it."""
    return tuple(int(part) / 255 for part in color.removeprefix("rgb(").rstrip(")").split(","))
