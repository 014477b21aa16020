"""The paper's figures, drawn with plotly.

Every figure is written twice: as HTML that needs no network, and as SVG for documents. plotly draws
static images only through a browser, which a fresh machine has not, so the SVG is drawn by
matplotlib from the same traces.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import plotly.graph_objects as go
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


def write_figure(figure: go.Figure, path: str | Path) -> list[Path]:
    """Write `path`.html, self-contained, and `path`.svg; gives back both paths."""
    stem = Path(path)
    stem.parent.mkdir(parents=True, exist_ok=True)
    html, svg = stem.with_suffix(".html"), stem.with_suffix(".svg")
    figure.write_html(html, include_plotlyjs=True, full_html=True)
    _static(figure).savefig(svg, bbox_inches="tight")
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
            style = {"dot": ":", "dash": "--"}.get(trace.line.dash or "", "-")
            marker = "o" if "markers" in (trace.mode or "") else None
            axes.plot(
                at, trace.y, style, marker=marker, label=trace.name, color=_rgb(trace.line.color)
            )
    if categories:
        axes.set_xticks(range(len(categories)), [str(c) for c in categories])
    layout = figure.layout
    axes.set_title(layout.title.text or "")
    axes.set_xlabel(layout.xaxis.title.text or "")
    axes.set_ylabel(layout.yaxis.title.text or "")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    return static


def _rgb(color: str) -> tuple[float, ...]:
    """`rgb(136, 204, 238)` as matplotlib wants it."""
    return tuple(int(part) / 255 for part in color.removeprefix("rgb(").rstrip(")").split(","))
