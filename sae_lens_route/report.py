"""What a reproduction's numbers say: routing gain, tables in Markdown, figures.

All of it is computed from the content of `reproduction.json`, so it can be drawn again without
training anything.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scipy import stats

from sae_lens_route.plots import (
    feature_profiles,
    routing_shares,
    threshold_curves,
    tradeoff,
    write_figure,
)

ROUTE = "RouteSAE"
ASSIGNMENT = "RouteSAE, assignment"
FROZEN = "RouteSAE, frozen router"
RANDOM = "Random"
PLAIN_MSE = "RouteSAE, plain MSE"
SOFT = "RouteSAE, soft"
MEAN = "RouteSAE, mean"
ATTENTION = "RouteSAE, attention"
MLSAE = "MLSAE"
TOPK = "TopK"
SAELENS_TOPK = "TopK, SAELens defaults"
RELU, GATED, JUMPRELU = "ReLU", "Gated", "JumpReLU"
CROSSCODER, CROSSCODER_TOPK = "Crosscoder", "Crosscoder, TopK"

ROUTERS = (ROUTE, FROZEN, ASSIGNMENT)
"""Methods with a router that is held against a random one with its shares."""
SHOWN = (ROUTE, ASSIGNMENT, RANDOM, TOPK, RELU, GATED, JUMPRELU, CROSSCODER)
"""Methods of the figures over sparsity."""
TRADED = (*SHOWN, SOFT, ATTENTION)
"""Methods that are trained at further sparsities, for these figures and for Tables 2 and 3."""
DIFFERENCES = (
    "no latent bias (Eq. 10)",
    "SAELens's start, decoder norm 0.1",
    "decoder norm never set",
    "SAELens's loss for dead features",
    "without the last block",
)
"""Variants of the RouteSAE where the paper, its code and SAELens differ."""

THRESHOLD_SHARES = (0.1, 0.15, 0.2, 0.25, 0.331, 0.4)
"""Thresholds on activations, as shares of sqrt(d_in); the paper's 15 is 0.331."""
READ_SHARE = 0.2
"""The one that features are read at: the demo model's features are weaker than Llama's."""


class Interval(NamedTuple):
    """A mean over seeds with its 95 % t-interval; without one for a single seed."""

    mean: float
    half_width: float | None

    def __str__(self) -> str:
        return self.show()

    def show(self, form: str = ".3f") -> str:
        """As text: mean ± half width."""
        half = "" if self.half_width is None else f" ± {self.half_width:{form.lstrip('+')}}"
        return f"{self.mean:{form}}{half}"


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval of a few independent values, by Student's t."""
    if len(values) < 2:
        return Interval(values[0], None)
    spread = statistics.stdev(values) / len(values) ** 0.5
    return Interval(statistics.fmean(values), float(stats.t.ppf(0.975, len(values) - 1)) * spread)


def routing_gain(
    router: Sequence[Mapping[str, Any]], random: Sequence[Mapping[str, Any]], metric: str
) -> Interval:
    """How much lower a metric is with a router than with a random one of the same shares.

    1 - router / random for each seed: both dictionaries are trained on their own partition, so what
    is left is what the partition itself is worth. Shares alone, which decide how hard the layers
    are, cancel.

    Args:
        router: Rows of a sweep for one router.
        random: The rows of its share-matched random routers, with the same seeds.
        metric: "norm_mse" or "kl".

    Raises:
        ValueError: the seeds differ.
    """
    by_seed = {row["seed"]: row[metric] for row in random}
    if sorted(by_seed) != sorted(row["seed"] for row in router):
        raise ValueError(f"random routers have seeds {sorted(by_seed)}, the router others")
    return interval([1 - row[metric] / by_seed[row["seed"]] for row in router])


def at_shares(row: Mapping[str, Any], shares: Sequence[float], metric: str) -> float | None:
    """A metric of one router had it the shares of another: its layers' means, weighted anew.

    Args:
        row: Of a sweep.
        shares: One for each routed layer.
        metric: "norm_mse" or "kl".
    """
    by_layer = row[f"{metric}_by_layer"]
    if any(value is None and share > 0 for value, share in zip(by_layer, shares, strict=True)):
        return None
    return sum((value or 0.0) * share for value, share in zip(by_layer, shares, strict=True))


# --- tables and figures --------------------------------------------------------------------------


def tables(content: Mapping[str, Any]) -> dict[str, str]:
    """Every table of the page, in Markdown, by name."""
    return {
        "settings": _settings_table(content),
        "routers": routers_table(content),
        "shares": _shares_table(content),
        "methods": _methods_table(content),
        "differences": _differences_table(content),
        "context-rules": _context_rules_table(content),
        "sparsity": _sparsity_table(content, SHOWN),
        "aggregation": _sparsity_table(content, (ROUTE, ATTENTION)),
        "soft": _sparsity_table(content, (ROUTE, SOFT)),
        "features": _features_table(content),
        "claims": _claims_table(content),
        "unscaled": _unscaled_table(content),
        "paper": _paper_table(content),
        "feature-layers": _feature_layers_table(content),
        "depth": _depth_table(content),
    }


PAPER_MODEL, PAPER_D_SAE = "Llama-3.2-1B-Instruct", 16_384
PAPER_ROUTE_SAE = {  # k: NormMSE, KL per 512 tokens, features, score (paper, Tables 2 and 3)
    48: (0.174, 99, 4310, 4.33),
    52: (0.168, 95, 4393, 4.41),
    56: (0.164, 89, 4312, 4.47),
    60: (0.161, 85, 4144, 4.39),
    64: (0.158, 81, 4194, 4.49),
    68: (0.155, 83, 4100, 4.42),
}


def _paper_table(content: Mapping[str, Any]) -> str:
    """The paper's RouteSAE, and ours beside it where model, size and k are the same."""
    settings = content["settings"]
    matches = settings["model_name"].endswith(PAPER_MODEL) and settings["d_sae"] == PAPER_D_SAE
    rows = []
    for k, (norm_mse, kl, n_features, score) in PAPER_ROUTE_SAE.items():
        own = [
            row for row in content["methods"] if matches and row["label"] == ROUTE and row["k"] == k
        ]
        ours = [_over_seeds(own, "norm_mse"), _over_seeds(own, "kl_per_512_tokens", ".0f")]
        rows.append([k, norm_mse, ours[0], kl, ours[1], n_features, score])
    header = ["k", "NormMSE, paper", "ours", "KL per 512 tokens, paper", "ours"]
    return _markdown([*header, "features, paper", "score, paper"], rows)


def fill_tables(page: Path, by_name: Mapping[str, str]) -> None:
    """Put the tables between their markers in a Markdown file; the rest stays as it is.

    Raises:
        ValueError: the page marks a table that there is none for.
    """

    def filled(match: re.Match[str]) -> str:
        if match[2] not in by_name:
            raise ValueError(f"{page}: no table {match[2]!r}; there are {', '.join(by_name)}")
        return f"{match[1]}\n{by_name[match[2]]}\n{match[3]}"

    pattern = r"(<!-- table: ([\w-]+) -->).*?(<!-- /table -->)"
    page.write_text(re.sub(pattern, filled, page.read_text(), flags=re.S))


def _markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _main(content: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Rows of the main comparison by label."""
    by_label: dict[str, list[dict[str, Any]]] = {}
    for row in content["methods"]:
        if row["name"] == f"{row['label']} seed={row['seed']}":
            by_label.setdefault(row["label"], []).append(row)
    return by_label


def _over_seeds(rows: Sequence[Mapping[str, Any]], metric: str, form: str = ".3f") -> str:
    values = [float(row[metric]) for row in rows if row.get(metric) is not None]
    return interval(values).show(form) if values else "-"


def _settings_table(content: Mapping[str, Any]) -> str:
    return _markdown(["setting", "value"], content["settings"].items())


def routers_table(content: Mapping[str, Any]) -> str:
    """Routing gain in Markdown, from the rows of `methods` and of `share_matched`."""
    main = _main(content)
    random = {row["name"]: row for row in content["share_matched"]}
    winner = {row["seed"]: row["share"] for row in main[ASSIGNMENT]}
    header = ["router", "NormMSE", "KL", "same shares, random: NormMSE", "KL", "gain, NormMSE"]
    header += [
        "gain, KL",
        "NormMSE at the assignment's shares",
        "KL there",
        "least share",
        "mean p",
    ]
    rows = []
    for label in (*ROUTERS, RANDOM):
        own = main[label]
        cells = [label, _over_seeds(own, "norm_mse"), _over_seeds(own, "kl")]
        if label in ROUTERS:
            twins = [random[row["name"]] for row in own]
            cells += [_over_seeds(twins, "norm_mse"), _over_seeds(twins, "kl")]
            cells += [routing_gain(own, twins, m).show(".1%") for m in ("norm_mse", "kl")]
        else:
            cells += ["-"] * 4
        for metric in ("norm_mse", "kl"):
            values = [at_shares(row, winner[row["seed"]], metric) for row in own]
            known = [value for value in values if value is not None]
            cells.append(interval(known).show() if len(known) == len(own) else "-")
        cells.append(f"{min(min(row['share']) for row in own):.3f}")
        cells.append(_over_seeds(own, "route_weight", ".2f"))
        rows.append(cells)
    return _markdown(header, rows)


def _shares_table(content: Mapping[str, Any]) -> str:
    blocks = content["settings"]["routed_blocks"]
    rows = [
        [label, row["seed"], *(f"{share:.2f}" for share in row["share"])]
        for label, own in _main(content).items()
        if "share" in own[0] and len(own[0]["share"]) > 1
        for row in own
    ]
    return _markdown(["method", "seed", *(f"block {block}" for block in blocks)], rows)


def _methods_table(content: Mapping[str, Any]) -> str:
    header = ["method", "seeds", "parameters", "L0", "NormMSE", "KL", "loss recovered"]
    header += ["dead features", "mean p"]
    rows = [
        [
            label,
            len(own),
            f"{own[0]['n_parameters']:,}",
            _over_seeds(own, "l0", ".1f"),
            _over_seeds(own, "norm_mse"),
            _over_seeds(own, "kl"),
            _over_seeds(own, "loss_recovered"),
            _over_seeds(own, "dead_features", ".0f"),
            _over_seeds(own, "route_weight", ".2f"),
        ]
        for label, own in _main(content).items()
    ]
    return _markdown(header, rows)


def _by_k(content: Mapping[str, Any], label: str) -> dict[int, dict[str, Any]]:
    """A method's rows of the first seed by the k it aims at, with what its features are like."""
    settings = content["settings"]
    first = settings["seeds"][0]
    names = {settings["k"]: f"{label} seed={first}"}
    names |= {k: f"{label} k={k}" for k in settings["other_ks"]}
    rows = {row["name"]: row for row in content["methods"]}
    features = {row["name"]: row for row in content["features"]["methods"]}
    at = THRESHOLD_SHARES.index(READ_SHARE)
    return {
        k: {
            **rows[names[k]],
            "k": k,
            "n_features": features[names[k]]["n_features"][at],
            "score": _score(features[names[k]]),
        }
        for k in sorted(names)
        if names[k] in rows
    }


def _score(features: Mapping[str, Any]) -> float | None:
    """The judge's where there is one, else the offline statistic."""
    if features["judge_score"] is not None:
        return features["judge_score"]
    return features["offline_scores"][THRESHOLD_SHARES.index(READ_SHARE)]


def _sparsity_table(content: Mapping[str, Any], labels: Sequence[str]) -> str:
    forms = {"l0": ".1f", "norm_mse": ".3f", "kl": ".3f", "n_features": ".0f", "score": ".3f"}
    rows = [
        [label, k, *(_cell_of(row.get(column), form) for column, form in forms.items())]
        for label in labels
        for k, row in _by_k(content, label).items()
    ]
    header = [
        "method",
        "k aimed at",
        "L0",
        "NormMSE",
        "KL",
        f"features above {READ_SHARE:g} sqrt d",
    ]
    return _markdown([*header, "score"], rows)


def _cell_of(value: float | int | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _differences_table(content: Mapping[str, Any]) -> str:
    """What each choice moves, against the RouteSAE with the same seed."""
    main = _main(content)
    by_label = {label: main[label] for label in (ROUTE, PLAIN_MSE, MEAN, ATTENTION)}
    for row in content["differences"]:
        by_label.setdefault(row["label"], []).append(row)
    route = {row["seed"]: row for row in main[ROUTE]}
    rows = []
    for label, own in by_label.items():
        cells = [label]
        for metric in ("norm_mse", "kl"):
            changes = [row[metric] / route[row["seed"]][metric] - 1 for row in own]
            change = "-" if label == ROUTE else interval(changes).show("+.1%")
            cells += [_over_seeds(own, metric), change]
        cells.append(interval([row["share"][-1] for row in own]).show(".2f"))
        cells.append(_over_seeds(own, "route_weight", ".2f"))
        cells.append(_over_seeds(own, "dead_features", ".0f"))
        rows.append(cells)
    header = ["variant", "NormMSE", "change", "KL", "change", "share of the last block", "mean p"]
    return _markdown([*header, "dead features"], rows)


def _context_rules_table(content: Mapping[str, Any]) -> str:
    at = THRESHOLD_SHARES.index(READ_SHARE)
    rows = []
    for label, own in _main_features(content).items():
        if label in (ROUTE, ASSIGNMENT, TOPK):
            kept = [float(row["n_features"][at]) for row in own]
            cells = [
                _over_seeds(own, name, ".0f")
                for name in ("more_than_4_contexts", "at_most_32_classes")
            ]
            rows.append([label, interval(kept).show(".0f"), *cells])
    header = ["method", "at least 4 contexts (paper)", "more than 4 (code)"]
    return _markdown([*header, "at most 32 token classes (code)"], rows)


def _main_features(content: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    main = {row["name"] for rows in _main(content).values() for row in rows}
    by_label: dict[str, list[dict[str, Any]]] = {}
    for row in content["features"]["methods"]:
        if row["name"] in main:
            by_label.setdefault(row["label"], []).append(row)
    return by_label


def _features_table(content: Mapping[str, Any]) -> str:
    header = ["method", *(f"features above {share:g} sqrt d" for share in THRESHOLD_SHARES)]
    rows = []
    for label, own in _main_features(content).items():
        counts = [
            interval([float(row["n_features"][i]) for row in own]).show(".0f")
            for i in range(len(THRESHOLD_SHARES))
        ]
        at = THRESHOLD_SHARES.index(READ_SHARE)
        known = [row["offline_scores"][at] for row in own if row["offline_scores"][at] is not None]
        offline = interval(known).show() if known else "-"
        rows.append([label, *counts, offline, _over_seeds(own, "judge_score")])
    return _markdown([*header, "offline score", "judge's score"], rows)


def _claims_table(content: Mapping[str, Any]) -> str:
    """Features and score over those of the single-layer baseline with exactly the same L0."""
    own = _main_features(content)
    at = THRESHOLD_SHARES.index(READ_SHARE)
    measures = {
        f"features above {READ_SHARE:g} sqrt d": lambda row: float(row["n_features"][at]),
        "offline score": lambda row: row["offline_scores"][at],
    }
    rows = []
    for title, measure in measures.items():
        values = {
            label: {row["seed"]: measure(row) for row in rows_of if measure(row) is not None}
            for label, rows_of in own.items()
        }
        means = {
            label: statistics.fmean(known.values()) for label, known in values.items() if known
        }
        for label in (ROUTE, ASSIGNMENT, RANDOM):
            seeds = [seed for seed in values[label] if values[TOPK].get(seed)]
            if not seeds:
                continue
            gain = interval([values[label][seed] / values[TOPK][seed] - 1 for seed in seeds])
            cells = [f"{means[label]:.3g}", f"{means[TOPK]:.3g}", gain.show("+.1%")]
            rows.append([title, label, *cells])
    return _markdown(["measure", "method", "mean", "TopK", "difference"], rows)


def _unscaled_table(content: Mapping[str, Any]) -> str:
    numbers = {"route_weight": ".2f", "kl": ".4f", "kl_unscaled": ".4f"}
    rows = [
        [row["label"], row["seed"], *(f"{row[name]:{form}}" for name, form in numbers.items())]
        for row in content["unscaled"]
    ]
    return _markdown(["method", "seed", "mean p", "KL, scaled", "KL, unscaled"], rows)


def _feature_layers_table(content: Mapping[str, Any]) -> str:
    rows = [
        [
            shown["kind"],
            shown["feature"],
            shown["n_classes"],
            f"{shown['mean_layer'] + content['settings']['routed_blocks'][0]:.1f}",
            " / ".join(f"{100 * share:.0f}" for share in shown["layer_share"]),
            "<br>".join(f"`{_cell(text)}`" for text in shown["contexts"]),
        ]
        for shown in content["features"]["by_layer"]["shown"]
    ]
    header = ["kind", "feature", "token classes", "mean block", "share per block, %", "contexts"]
    return _markdown(header, rows)


def _depth_table(content: Mapping[str, Any]) -> str:
    """Whether features of many token classes live deeper than those of few."""
    by_layer = content["features"]["by_layer"]
    first = content["settings"]["routed_blocks"][0]
    pairs = sorted(zip(by_layer["n_classes"], by_layer["mean_layer"], strict=True))
    header = ["features", "rank correlation of classes and block", "p"]
    header += ["median block, quarter with the fewest classes", "with the most", "p, one-sided"]
    if len(pairs) < 8:
        return _markdown(header, [[len(pairs), *["-"] * 5]])
    blocks = [first + layer for _, layer in pairs]
    quarter = len(pairs) // 4
    few, many = blocks[:quarter], blocks[-quarter:]
    correlation: Any = stats.spearmanr([n for n, _ in pairs], blocks)
    deeper: Any = stats.mannwhitneyu(many, few, alternative="greater")
    cells = [f"{correlation.statistic:.2f}", f"{correlation.pvalue:.2g}"]
    cells += [f"{statistics.median(part):.1f}" for part in (few, many)]
    return _markdown(header, [[len(pairs), *cells, f"{deeper.pvalue:.2g}"]])


def _cell(text: str, width: int = 90) -> str:
    """Text of one line that a table cell can hold, around what is marked."""
    text = " ".join(text.split()).replace("|", "&#124;").replace("`", "'")
    start = max(0, text.find("<ACTIVATED>") - width // 2)
    end = max(start + width, text.find("</ACTIVATED>") + len("</ACTIVATED>") + width // 4)
    return ("…" if start else "") + text[start:end] + ("…" if end < len(text) else "")


def write_figures(content: Mapping[str, Any], folder: Path) -> list[Path]:
    """The paper's figures from a reproduction, each as HTML and SVG; gives back their paths."""
    settings = content["settings"]
    blocks = settings["routed_blocks"]
    shown = [row for label in SHOWN for row in _by_k(content, label).values()]
    main = _main_features(content)
    features = [row for label in SHOWN if label in main for row in main[label]]
    route = {row["name"]: row for row in content["features"]["methods"] if row["label"] == ROUTE}
    route_by_k = [
        {**route[row["name"]], "label": f"k {k}"} for k, row in _by_k(content, ROUTE).items()
    ]
    shares = {label: rows for label, rows in _main(content).items() if label in (*ROUTERS, RANDOM)}
    in_training = {
        label: [row for row in content["training_shares"] if row["label"] == label]
        for label in ROUTERS
    }
    figures = {
        "tradeoff_kl": tradeoff(shown, "kl"),
        "tradeoff_norm_mse": tradeoff(shown, "norm_mse"),
        "features_by_sparsity": tradeoff(shown, "n_features"),
        "scores_by_sparsity": tradeoff(shown, "score"),
        "features_by_threshold": threshold_curves(features, "n_features"),
        "route_features_by_threshold": threshold_curves(route_by_k, "n_features"),
        "route_scores_by_threshold": threshold_curves(route_by_k, "offline_scores"),
        "routing_shares": routing_shares(shares, blocks),
        "routing_shares_training": routing_shares(in_training, blocks),
        "features_by_layer": feature_profiles(content["features"]["by_layer"]["shown"], blocks),
    }
    return [
        path for name, figure in figures.items() for path in write_figure(figure, folder / name)
    ]
