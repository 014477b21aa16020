"""Figures: what is drawn where, and the two files of each."""

import re
from pathlib import Path

import pytest
from support.reproduction import row

from sae_lens_route.evals.reconstruction import ReconstructionMetrics
from sae_lens_route.plots import (
    FeatureByBlock,
    Span,
    ThresholdCurve,
    TradeoffPoint,
    concept_depth,
    concept_recovery,
    concept_recovery_by_block,
    feature_profiles,
    recovery_by_depth,
    routing_shares,
    routing_weights,
    threshold_curves,
    tradeoff,
    training_curves,
    write_figure,
)


def test_a_tradeoff_averages_over_seeds_and_shows_every_run():
    points = [
        TradeoffPoint("b", (8,), 8.0, 0.3),
        TradeoffPoint("a", (16,), 15.0, 0.2),
        TradeoffPoint("a", (8,), 7.0, 0.5),
        TradeoffPoint("a", (8,), 9.0, 0.7),
        TradeoffPoint("soft", (8,), 8.0, None),
    ]
    b, a, runs = tradeoff(points, "NormMSE").data
    assert (b.name, list(b.x), list(b.y)) == ("b", [8.0], [0.3])
    assert (a.name, list(a.x), list(a.y)) == ("a", [8.0, 15.0], [pytest.approx(0.6), 0.2])
    assert (list(runs.x), list(runs.y), runs.showlegend) == ([15, 7, 9], [0.2, 0.5, 0.7], False)


def test_a_point_is_a_row_at_its_l0_with_the_metric_that_is_given():
    """L0, KL, NormMSE and delta CE of the row are all different, so none can pass for another."""
    made = row("a", l0=16.0, kl=0.5, norm_mse=0.25)
    assert len({made.l0, made.kl, made.norm_mse, made.downstream.delta_ce}) == 4
    point = TradeoffPoint.of(made, made.kl)
    assert point == ("a", made.sparsity, 16.0, 0.5)
    (line,) = tradeoff([point], "KL, nats per token").data
    assert (line.name, list(line.x), list(line.y)) == ("a", [16.0], [0.5])


def test_the_axes_of_a_tradeoff_are_named():
    layout = tradeoff([TradeoffPoint("a", (8,), 8.0, 0.3)], "KL, nats per token").layout
    assert layout.xaxis.title.text == "L0, active features per token"
    assert layout.yaxis.title.text == "KL, nats per token"


def test_a_training_curve_is_loss_over_tokens():
    records = [{"tokens": 64, "loss": 0.5}, {"tokens": 128, "loss": 0.25}]
    line, other = training_curves({"a": records, "b": records[:1]}).data
    assert (line.name, list(line.x), list(line.y)) == ("a", [64, 128], [0.5, 0.25])
    assert (other.name, list(other.x)) == ("b", [64]) and other.line.color != line.line.color


def test_shares_are_means_over_runs_at_the_models_blocks():
    runs = [{2: 0.5, 5: 0.3, 9: 0.2}, {2: 0.1, 5: 0.3, 9: 0.6}]
    figure = routing_shares({"hard": runs, "random": [{2: 0.2, 5: 0.2, 9: 0.6}]})
    hard, random = figure.data
    assert list(hard.x) == list(random.x) == ["2", "5", "9"]
    assert list(hard.y) == pytest.approx([0.3, 0.3, 0.4])
    assert figure.layout.xaxis.title.text == "block"


def metrics(share, probs):
    others = dict.fromkeys(ReconstructionMetrics._fields, 0)
    return ReconstructionMetrics(
        **{**others, "share_by_block": share, "mean_probs_by_block": probs}
    )


def test_routing_weights_are_drawn_at_the_models_blocks():
    train = metrics({2: 0.0, 9: 1.0}, {2: 0.25, 9: 0.75})
    heldout = metrics({2: 0.5, 9: 0.5}, {2: 0.5, 9: 0.5})
    traces = routing_weights({"train": train, "held-out": heldout}).data
    assert [trace.name for trace in traces] == [
        "share, train",
        "share, held-out",
        "mean p, train",
        "mean p, held-out",
    ]
    assert all(list(trace.x) == ["2", "9"] for trace in traces)
    assert list(traces[0].y) == [0, 1] and list(traces[1].y) == [0.5, 0.5]
    assert list(traces[2].y) == [0.25, 0.75] and list(traces[3].y) == [0.5, 0.5]


def test_curves_of_one_label_are_averaged_where_they_have_values():
    curves = [
        ThresholdCurve("a", [1.0, 2.0, 3.0], [4.0, 2.0, None]),
        ThresholdCurve("a", [1.0, 2.0, 3.0], [6.0, None, None]),
        ThresholdCurve("b", [1.0], [1.0]),
    ]
    a, b = threshold_curves(curves, "Features").data
    assert (a.name, list(a.x), list(a.y)) == ("a", [1, 2], [5, 2])
    assert (b.name, list(b.x), list(b.y)) == ("b", [1], [1])


def test_profiles_are_relative_to_the_largest_activation():
    profiles = [
        FeatureByBlock("word", 7, {2: 1.0, 5: 4.0, 9: 2.0}),
        FeatureByBlock("phrase", 3, {2: 0.0, 5: 0.0, 9: 0.0}),
    ]
    word, phrase = feature_profiles(profiles).data
    assert (word.name, list(word.x), list(word.y)) == ("word 7", [2, 5, 9], [0.25, 1, 0.5])
    assert list(phrase.y) == [0, 0, 0] and phrase.line.color != word.line.color


def test_a_figure_is_written_twice_and_the_same_each_time(tmp_path):
    figure = training_curves({"a": [{"tokens": 64, "loss": 0.5}, {"tokens": 128, "loss": 0.25}]})
    html, svg = write_figure(figure, tmp_path / "a" / "loss")
    assert "Plotly.newPlot" in html.read_text() and "<script src=" not in html.read_text()
    assert write_figure(figure, tmp_path / "b" / "loss")[1].read_bytes() == svg.read_bytes()


def spans(overall, word):
    """Intervals from F1 - .1 to F1 + .2."""
    return {
        level: Span(f1, f1 - 0.1, f1 + 0.2) for level, f1 in {"all": overall, "word": word}.items()
    }


def test_recovered_concepts_are_bars_by_level_with_their_intervals():
    chance = {"all": 0.15, "word": 0.25}
    figure = concept_recovery({"a": spans(0.4, 0.6), "b": spans(0.2, 0.4)}, chance)
    a, b, permuted = figure.data
    assert (a.name, list(a.x), list(a.y)) == ("a", ["all", "word"], [0.4, 0.6])
    assert list(b.y) == [0.2, 0.4]
    assert list(a.error_y.array) == pytest.approx([0.2, 0.2])
    assert list(a.error_y.arrayminus) == pytest.approx([0.1, 0.1])
    assert (permuted.name, list(permuted.x)) == ("permuted labels", ["all", "word"])
    assert list(permuted.y) == [0.15, 0.25]


def test_single_layers_are_a_curve_and_the_others_are_level():
    layers = {2: Span(0.1, 0.0, 0.3), 9: Span(0.3, 0.2, 0.5)}
    figure = concept_recovery_by_block("word", layers, {"route": Span(0.5, 0.5, 0.5)})
    curve, other = figure.data
    assert figure.layout.title.text.endswith(": word")
    assert (list(curve.x), list(curve.y)) == ([2, 9], [0.1, 0.3])
    assert list(curve.error_y.array) == pytest.approx([0.2, 0.2])
    assert (other.name, list(other.x), list(other.y)) == ("route", [2, 9], [0.5, 0.5])


def test_depth_of_the_levels_is_a_line_for_each_method():
    figure = concept_depth({"a": {"word": 7.0, "syntax": 9.0}})
    (line,) = figure.data
    assert (line.name, list(line.x), list(line.y)) == ("a", ["word", "syntax"], [7.0, 9.0])


def test_recovery_of_known_features_is_bars_by_depth():
    by_depth = {"early": Span(0.25, 0.2, 0.4), "late": Span(0.5, 0.5, 0.5)}
    (bars,) = recovery_by_depth({"a": by_depth}).data
    assert (bars.name, list(bars.x), list(bars.y)) == ("a", ["early", "late"], [0.25, 0.5])
    assert list(bars.error_y.array) == pytest.approx([0.15, 0.0])
    assert list(bars.error_y.arrayminus) == pytest.approx([0.05, 0.0])


# --- the SVG, which matplotlib draws from the same traces -----------------------------------------


def svg_of(figure, folder: Path) -> str:
    return write_figure(figure, folder / "figure")[1].read_text()


def points(path: str) -> list[tuple[float, float]]:
    """Corners of a path; in an SVG, y grows downwards."""
    numbers = [float(number) for number in re.findall(r"-?[\d.]+(?:e-?\d+)?", path)]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def paths(svg: str, style: str) -> list[list[tuple[float, float]]]:
    """The paths inside the axes whose style begins with this, in the order they are drawn."""
    found = re.findall(r'<path d="([^"]*)" clip-path="[^"]*" style="([^"]*)"', svg)
    return [points(path) for path, its_style in found if its_style.startswith(style)]


def test_lines_of_the_svg_run_as_the_numbers_do(tmp_path):
    ascending = [TradeoffPoint("a", (k,), float(k), float(k)) for k in (8, 16, 24)]
    falling = [TradeoffPoint("b", (k,), float(k), 32.0 - k) for k in (8, 16, 24)]
    svg = svg_of(tradeoff([*ascending, *falling], "KL"), tmp_path)
    a, b = paths(svg, "fill: none; stroke: #88ccee"), paths(svg, "fill: none; stroke: #cc6677")
    (up,), (down,) = a, b
    for line in (up, down):
        (x0, _), (x1, _), (x2, _) = line
        assert x1 - x0 == pytest.approx(x2 - x1, abs=1e-3) and x1 > x0
    assert up[0][1] > up[1][1] > up[2][1] and down[0][1] < down[1][1] < down[2][1]
    assert up[0][1] == pytest.approx(down[2][1], abs=1e-3)  # both are 8
    assert svg.index("<!-- a -->") < svg.index("<!-- b -->")  # the legend, in the same order


def test_bars_of_the_svg_are_as_high_as_the_shares(tmp_path):
    svg = svg_of(routing_shares({"hard": [{2: 0.125, 5: 0.5, 9: 0.375}]}), tmp_path)
    bars = paths(svg, "fill: #88ccee")
    assert [bar[0][0] for bar in bars] == sorted(bar[0][0] for bar in bars)
    heights = [max(y for _, y in bar) - min(y for _, y in bar) for bar in bars]
    assert [height / sum(heights) for height in heights] == pytest.approx(
        [0.125, 0.5, 0.375], abs=1e-4
    )


def test_intervals_of_the_svg_are_as_long_as_the_numbers(tmp_path):
    svg = svg_of(concept_recovery({"a": spans(0.4, 0.6)}, {}), tmp_path)
    bars = paths(svg, "fill: #88ccee")
    drawn = paths(svg, "fill: none; stroke: #4c4c4c")
    assert len(bars) == len(drawn) == 2
    for bar, span, f1 in zip(bars, drawn, (0.4, 0.6), strict=True):
        bottom, top = max(y for _, y in bar), min(y for _, y in bar)
        scale = (bottom - top) / f1
        low, high = max(y for _, y in span), min(y for _, y in span)
        assert (bottom - low) / scale == pytest.approx(f1 - 0.1, abs=1e-4)
        assert (bottom - high) / scale == pytest.approx(f1 + 0.2, abs=1e-4)
        left, right = min(x for x, _ in bar), max(x for x, _ in bar)
        assert span[0][0] == pytest.approx((left + right) / 2, abs=1e-3)
