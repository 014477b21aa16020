"""The tables of a reproduction in Markdown, each a function of its `ReproductionResult`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

from scipy import stats

from sae_lens_route.evals.comparison import SweepRow
from sae_lens_route.features.sentences import CLOSE, OPEN
from sae_lens_route.paper.markdown import markdown
from sae_lens_route.paper.methods import (
    ASSIGNMENT,
    METHODS,
    ROUTE,
    TOPK,
    Exhibit,
    Method,
    shown_in,
)
from sae_lens_route.paper.plan import Stage
from sae_lens_route.paper.results import (
    FeatureCounts,
    RateTrial,
    ReproductionResult,
    Trained,
    counted_shares,
    of_method,
)
from sae_lens_route.paper.statistics import (
    Metric,
    at_shares,
    interval,
    metric_interval,
    metric_of,
    over_seeds,
    routing_gain,
)

PAPER_MODEL, PAPER_D_SAE = "Llama-3.2-1B-Instruct", 16_384

PAPER_ROUTE_SAE = {  # k: NormMSE, KL per 512 tokens, features, score (paper, Tables 2 and 3)
    48: (0.174, 99, 4310, 4.33),
    52: (0.168, 95, 4393, 4.41),
    56: (0.164, 89, 4312, 4.47),
    60: (0.161, 85, 4144, 4.39),
    64: (0.158, 81, 4194, 4.49),
    68: (0.155, 83, 4100, 4.42),
}

_METRICS: tuple[Metric, ...] = ("norm_mse", "kl")


def tables(result: ReproductionResult) -> dict[str, str]:
    """Every table of the page, in Markdown, by name."""
    return {
        "settings": _settings_table(result),
        "learning-rates": learning_rates_table(result.learning_rates),
        "routers": routers_table(result.trained),
        "shares": _shares_table(result),
        "methods": _methods_table(result),
        "differences": _differences_table(result),
        "context-rules": _context_rules_table(result),
        "sparsity": _sparsity_table(result, "sparsity"),
        "aggregation": _sparsity_table(result, "aggregation"),
        "soft": _sparsity_table(result, "soft"),
        "features": _features_table(result),
        "claims": _claims_table(result),
        "unscaled": _unscaled_table(result),
        "paper": _paper_table(result),
        "feature-blocks": _feature_blocks_table(result),
        "depth": _depth_table(result),
        "steering": _steering_table(result),
    }


def _with_text(runs: Sequence[SweepRow], metric: Metric) -> str:
    """A metric with its interval over seeds and text; a dash where it does not exist."""
    if any(getattr(row, metric) is None for row in runs):
        return "-"
    return metric_interval(runs, metric).show()


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _rows(trained: Iterable[Trained], method: Method, *stages: Stage) -> list[SweepRow]:
    return [each.row for each in of_method(trained, method, *stages)]


def _settings_table(result: ReproductionResult) -> str:
    return markdown(["setting", "value"], asdict(result.settings).items())


def learning_rates_table(trials: Sequence[RateTrial]) -> str:
    """NormMSE of every trial, the lowest of a method in bold."""
    rates = sorted({trial.lr for trial in trials})
    errors: dict[str, dict[float, float]] = {}
    for trial in trials:
        errors.setdefault(trial.method, {})[trial.lr] = trial.norm_mse

    def cell(of: dict[float, float], lr: float) -> str:
        shown = _number(of.get(lr), ".3f")
        return f"**{shown}**" if of.get(lr) == min(of.values()) else shown

    rows = [[method, *(cell(of, lr) for lr in rates)] for method, of in errors.items()]
    return markdown(["method", *(f"{lr:.2g}" for lr in rates)], rows)


def routers_table(trained: Sequence[Trained]) -> str:
    """Routing gain, from the main comparison and the share-matched twins."""
    assignment = {row.seed: row.share_by_block or {} for row in _rows(trained, ASSIGNMENT, "main")}
    rows = []
    for method in shown_in("routers"):
        runs, twins = (_rows(trained, method, stage) for stage in ("main", "share_matched"))
        cells = [method.label, *(_with_text(runs, metric) for metric in _METRICS)]
        if method.has_twin:
            cells += [_with_text(twins, metric) for metric in _METRICS]
            cells += [routing_gain(runs, twins, metric).show(".1%") for metric in _METRICS]
        else:
            cells += ["-"] * 4
        for metric in _METRICS:
            values = [at_shares(row, assignment[row.seed], metric) for row in runs]
            cells.append("-" if None in values else over_seeds(values))
        cells.append(f"{min(min((row.share_by_block or {}).values()) for row in runs):.3f}")
        cells.append(over_seeds((row.route_weight for row in runs), ".2f"))
        rows.append(cells)
    header = ["router", "NormMSE", "KL", "same shares, random: NormMSE", "KL", "gain, NormMSE"]
    header += ["gain, KL", "NormMSE at the assignment's shares", "KL there", "least share"]
    return markdown([*header, "mean p"], rows)


def _shares_table(result: ReproductionResult) -> str:
    blocks = result.settings.routed_blocks
    rows = [
        [method.label, row.seed, *(_number(row.share_by_block.get(b), ".2f") for b in blocks)]
        for method in METHODS
        for row in _rows(result.trained, method, "main")
        if row.share_by_block is not None and len(row.share_by_block) > 1
    ]
    return markdown(["method", "seed", *(f"block {block}" for block in blocks)], rows)


def _dense(runs: Iterable[SweepRow]) -> str:
    """Features that fire on more than 10 % of the tokens."""
    counts = (row.reconstruction.dense_features for row in runs)
    return over_seeds((None if n is None else float(n) for n in counts), ".0f")


def _loss_recovered(row: SweepRow) -> float | None:
    return None if row.downstream is None else row.downstream.loss_recovered


def _methods_table(result: ReproductionResult) -> str:
    rows = [
        [
            method.label,
            len(runs),
            f"{runs[0].n_parameters:,}",
            over_seeds((row.l0 for row in runs), ".1f"),
            *(_with_text(runs, metric) for metric in _METRICS),
            over_seeds(_loss_recovered(row) for row in runs),
            over_seeds((float(row.reconstruction.dead_features) for row in runs), ".0f"),
            _dense(runs),
            over_seeds((row.route_weight for row in runs), ".2f"),
        ]
        for method in METHODS
        if (runs := _rows(result.trained, method, "main"))
    ]
    header = ["method", "seeds", "parameters", "L0", "NormMSE", "KL", "loss recovered"]
    return markdown([*header, "dead features", "dense features", "mean p"], rows)


def _sparsity_table(result: ReproductionResult, exhibit: Exhibit) -> str:
    rows = [
        [
            method.label,
            trained.run.k,
            f"{trained.row.l0:.1f}",
            f"{trained.row.norm_mse:.3f}",
            _number(trained.row.kl, ".3f"),
            _dense([trained.row]),
            features.n_read,
            _number(features.surface_score, ".3f"),
            _number(features.judge_score, ".3f"),
        ]
        for method in shown_in(exhibit)
        for trained, features in result.at_sparsities(method)
    ]
    header = ["method", "k aimed at", "L0", "NormMSE", "KL", "dense features", _read_title(result)]
    return markdown([*header, "surface score", "judge's score"], rows)


def _read_title(result: ReproductionResult) -> str:
    return f"features above {result.settings.read_share:g} sqrt d"


def _differences_table(result: ReproductionResult) -> str:
    """What each choice changes, compared with the RouteSAE of the same seed."""
    route = {row.seed: row for row in _rows(result.trained, ROUTE, "main")}
    rows = []
    for method in shown_in("differences"):
        if not (runs := _rows(result.trained, method, "main", "differences")):
            continue
        cells = [method.label]
        for metric in _METRICS:
            values = [metric_of(row, metric) for row in runs]
            bases = [metric_of(route[row.seed], metric) for row in runs]
            changes = [value / base - 1 for value, base in zip(values, bases, strict=True)]
            change = "-" if method == ROUTE else interval(changes).show("+.1%")
            cells += [over_seeds(values), change]
        last_shares = [(row.share_by_block or {})[row.blocks[-1]] for row in runs]
        dead_features = [float(row.reconstruction.dead_features) for row in runs]
        cells.append(over_seeds(last_shares, ".2f"))
        cells.append(over_seeds((row.route_weight for row in runs), ".2f"))
        cells += [over_seeds(dead_features, ".0f"), _dense(runs)]
        rows.append(cells)
    header = ["variant", "NormMSE", "change", "KL", "change", "share of its last block", "mean p"]
    return markdown([*header, "dead features", "dense features"], rows)


def _context_rules_table(result: ReproductionResult) -> str:
    rows = []
    for method in shown_in("context-rules"):
        runs = of_method(result.features.counts, method, "main")
        rules = [
            [counts.n_read for counts in runs],
            [counts.more_than_4_contexts for counts in runs],
            [counts.at_most_32_classes for counts in runs],
        ]
        rows.append([method.label, *(over_seeds(map(float, rule), ".0f") for rule in rules)])
    header = ["method", "at least 4 contexts (paper)", "more than 4 (code)"]
    return markdown([*header, "at most 32 token classes (code)"], rows)


def _features_table(result: ReproductionResult) -> str:
    rows = []
    for method in METHODS:
        if runs := of_method(result.features.counts, method, "main"):
            at_thresholds = zip(*(counts.n_features for counts in runs), strict=True)
            cells = [over_seeds(map(float, values), ".0f") for values in at_thresholds]
            cells.append(over_seeds(counts.surface_score for counts in runs))
            cells.append(over_seeds(counts.judge_score for counts in runs))
            rows.append([method.label, *cells])
    shares = counted_shares(result.settings.read_share)
    header = ["method", *(f"features above {share:g} sqrt d" for share in shares)]
    return markdown([*header, "surface score", "judge's score"], rows)


_Measure = Callable[[FeatureCounts], float | None]


def _by_seed(result: ReproductionResult, method: Method, measure: _Measure) -> dict[int, float]:
    runs = of_method(result.features.counts, method, "main")
    return {each.run.seed: value for each in runs if (value := measure(each)) is not None}


def _claims_table(result: ReproductionResult) -> str:
    """Features and score over those of TopK, the single-layer baseline with the same L0.

    The score is the judge's; without a judge it is the surface score, which is not the paper's.
    """
    judged = any(counts.judge_score is not None for counts in result.features.counts)
    measures: dict[str, _Measure] = {_read_title(result): lambda counts: float(counts.n_read)}
    if judged:
        measures["judge's score"] = lambda counts: counts.judge_score
    else:
        measures["surface score"] = lambda counts: counts.surface_score
    rows = []
    for title, measure in measures.items():
        base = _by_seed(result, TOPK, measure)
        for method in shown_in("claims"):
            values = _by_seed(result, method, measure)
            seeds = [seed for seed in values if base.get(seed)]
            if seeds:
                gain = interval([values[seed] / base[seed] - 1 for seed in seeds])
                means = [f"{statistics.fmean(each.values()):.3g}" for each in (values, base)]
                rows.append([title, method.label, *means, gain.show("+.1%")])
    return markdown(["measure", "method", "mean", "TopK", "difference"], rows)


def _unscaled_table(result: ReproductionResult) -> str:
    rows = [
        [
            scales.run.method,
            scales.run.seed,
            f"{scales.route_weight:.2f}",
            f"{scales.kl:.4f}",
            f"{scales.kl_unscaled:.4f}",
        ]
        for scales in result.unscaled
    ]
    return markdown(["method", "seed", "mean p", "KL, scaled", "KL, unscaled"], rows)


def _paper_table(result: ReproductionResult) -> str:
    """The paper's RouteSAE, with ours where model, size and k are the same."""
    settings = result.settings
    matches = settings.model_name.endswith(PAPER_MODEL) and settings.d_sae == PAPER_D_SAE
    trained = of_method(result.trained, ROUTE, "main", "sparsity")
    rows = []
    for k, (norm_mse, kl, n_features, score) in PAPER_ROUTE_SAE.items():
        runs = [each.row for each in trained if each.run.k == k and matches]
        kls = (None if row.downstream is None else row.downstream.kl_per_512_tokens for row in runs)
        ours = [over_seeds(row.norm_mse for row in runs), over_seeds(kls, ".0f")]
        rows.append([k, norm_mse, ours[0], kl, ours[1], n_features, score])
    header = ["k", "NormMSE, paper", "ours", "KL per 512 tokens, paper", "ours"]
    return markdown([*header, "features, paper", "score, paper"], rows)


def _feature_blocks_table(result: ReproductionResult) -> str:
    blocks = result.settings.routed_blocks
    rows = []
    for shown in result.features.shown:
        profile = shown.profile
        shares = profile.share_by_block or {}
        rows.append(
            [
                shown.kind,
                profile.feature,
                profile.n_classes,
                _number(profile.mean_block, ".1f"),
                *(_number(shares.get(block), ".0%") for block in blocks),
                "<br>".join(f"`{_cell(text)}`" for text in shown.contexts),
            ]
        )
    header = ["kind", "feature", "token classes", "mean block"]
    return markdown([*header, *(f"block {block}" for block in blocks), "contexts"], rows)


def _depth_table(result: ReproductionResult) -> str:
    """Whether features of many token classes live at deeper blocks than those of few."""
    depths = sorted(result.features.depths)
    header = ["features", "rank correlation of classes and block", "p"]
    header += ["median block, quarter with the fewest classes", "with the most", "p, one-sided"]
    if len(depths) < 8:
        return markdown(header, [[len(depths), *["-"] * 5]])
    blocks = [depth.mean_block for depth in depths]
    quarter = len(depths) // 4
    few, many = blocks[:quarter], blocks[-quarter:]
    correlation: Any = stats.spearmanr([depth.n_classes for depth in depths], blocks)
    deeper: Any = stats.mannwhitneyu(many, few, alternative="greater")
    cells = [f"{correlation.statistic:.2f}", f"{correlation.pvalue:.2g}"]
    cells += [f"{statistics.median(part):.1f}" for part in (few, many)]
    return markdown(header, [[len(depths), *cells, f"{deeper.pvalue:.2g}"]])


def _steering_table(result: ReproductionResult) -> str:
    """Figure 10: the steering that a rule chose, line by line."""
    rows = []
    for example in result.features.steering:
        size = f"at most {example.largest_size:.2f} of the stream's norm"
        rows += [
            ["feature", f"{example.feature}, which fires on {', '.join(example.words)}"],
            ["edit", f"`{example.edit}`, {size}"],
            ["prompt", f"`{_one_line(example.prompt)}`"],
            ["clean", f"`{_one_line(example.clean_text)}`"],
            ["steered", f"`{_one_line(example.steered_text)}`"],
            ["uses of its words", f"{example.n_clean} clean, {example.n_steered} steered"],
        ]
    return markdown(["part", "steering"], rows or [["none", "no candidate passed the rule"]])


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "&#124;").replace("`", "'")


def _cell(text: str, width: int = 90) -> str:
    """One line of text for a table cell, cut to the surroundings of the activated token."""
    text = _one_line(text)
    start = max(0, text.find(OPEN) - width // 2)
    end = max(start + width, text.find(CLOSE) + len(CLOSE) + width // 4)
    return ("…" if start else "") + text[start:end] + ("…" if end < len(text) else "")
