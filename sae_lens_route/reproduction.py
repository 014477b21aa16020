"""The paper's experiments on one model, in one command.

1. *Train.* Every method on one stream of activations (`sweep.py`), a few seeds each: the main
   comparison, further sparsities, and variants of the RouteSAE where the paper and its code differ.
2. *Match.* For every router a random one with the same share of the tokens per layer, trained in a
   second sweep: what a partition of the tokens is worth beyond its shares (`routing_gain`).
3. *Read.* Contexts of every method's features over the same held-out text, and the offline ranking
   of those features.
4. *Write.* `reproduction.json` holds all numbers; the tables of a Markdown page, between markers
   `<!-- table: NAME -->` and `<!-- /table -->`, are rewritten from it; figures as HTML and SVG.

Each stage leaves its results on disk, and what is there is not made again.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from sae_lens import SAE
from sae_lens.constants import ACTIVATIONS_STORE_STATE_FILENAME
from tqdm.auto import tqdm

from sae_lens_route.activations import RoutedActivationsStore
from sae_lens_route.baselines import StackedSAE
from sae_lens_route.evals import evaluate
from sae_lens_route.features import ContextCollector, ContextOptions, FeatureTable
from sae_lens_route.interpret import Judge, offline_ranking
from sae_lens_route.models import LanguageModel, load_model
from sae_lens_route.report import (
    ASSIGNMENT,
    ATTENTION,
    CROSSCODER,
    CROSSCODER_TOPK,
    DIFFERENCES,
    FROZEN,
    GATED,
    JUMPRELU,
    MEAN,
    MLSAE,
    PLAIN_MSE,
    RANDOM,
    READ_SHARE,
    RELU,
    ROUTE,
    ROUTERS,
    SAELENS_TOPK,
    SHOWN,
    SOFT,
    THRESHOLD_SHARES,
    TOPK,
    TRADED,
    fill_tables,
    tables,
    write_figures,
)
from sae_lens_route.router import Routing, normalize
from sae_lens_route.runner import TRAIN_LOG_FILENAME, RouteSAERunnerConfig
from sae_lens_route.saes import RoutedSAE
from sae_lens_route.sweep import SweepEntry, SweepRunner, evaluate_sweep, expand_runs

DEMO_K, DEMO_OTHER_KS, DEMO_TOKENS = 16, (8, 32), 400_000
"""What fits the demo model and 45 minutes on two cores."""

_NEAR_K = {
    RELU: (0.375, -0.43),
    GATED: (0.61, -0.55),
    JUMPRELU: (0.079, -0.93),
    CROSSCODER: (1.92e-3, -0.65),
}
"""What brings methods without a fixed k near 16 on the demo model, and its power of k / 16.

Read off the L0 of runs of 400,000 tokens on held-out text, 3 to 7 values of each. It is the L1
coefficient; for JumpReLU the initial threshold in units of sqrt(d_in), because in so short a run
the L0 penalty hardly moves it (.008 to .07 give 30 to 26 active features).
"""

_MIN_CONTEXTS = 8
_SHOWN = 5
_SHOWN_CONTEXTS = 3


@dataclass(frozen=True)
class Reproduction:
    """What to reproduce.

    Args:
        cfg: Model, text, tokens, schedule; `cfg.sae` gives d_in and d_sae.
        k: Sparsity of the main comparison.
        other_ks: Further sparsities, for the methods of the trade-off figures, with one seed.
        seeds: Seeds of the main comparison.
        eval_dataset: Held-out text.
        eval_tokens: Tokens of it to evaluate on.
        feature_tokens: Tokens of it to read features on.
        output: Folder for everything.
        judge: Model that scores features through an OpenAI-compatible endpoint; None leaves only
            the offline statistic.
        base_url: That endpoint.
    """

    cfg: RouteSAERunnerConfig
    k: int
    other_ks: tuple[int, ...]
    seeds: tuple[int, ...]
    eval_dataset: Any
    eval_tokens: int
    feature_tokens: int
    output: Path
    judge: str | None = None
    base_url: str | None = None


def main_runs(k: int, d_in: int, last_block: int, n_steps: int) -> dict[str, dict[str, Any]]:
    """Every method at one sparsity, as `expand_runs` takes them.

    Single-layer baselines read the last routed block, as the paper's do.
    """
    one = {"blocks": [last_block]}
    return {
        ROUTE: {"k": k},
        FROZEN: {"k": k, "router_objective": "frozen"},
        ASSIGNMENT: {"k": k, "router_objective": "assignment"},
        RANDOM: {"k": k, "routing": "uniform"},
        PLAIN_MSE: {"k": k, "loss": "mse"},
        SOFT: {"k": k, "routing": "soft"},
        MEAN: {"k": k, "aggregation": "mean"},
        ATTENTION: {"k": k, "aggregation": "attention"},
        MLSAE: {"k": k, "architecture": "multi_layer_topk"},
        TOPK: {"k": k, **one},
        SAELENS_TOPK: {"k": k, "architecture": "topk", **one},
        RELU: {"architecture": "route_standard", "l1_coefficient": _near(RELU, k), **one},
        GATED: {"architecture": "route_gated", "l1_coefficient": _near(GATED, k), **one},
        JUMPRELU: {
            "architecture": "route_jumprelu",
            "l0_coefficient": 0.015,
            "jumprelu_init_threshold": _near(JUMPRELU, k) * d_in**0.5,
            **one,
        },
        CROSSCODER: {
            "architecture": "crosscoder",
            "l1_coefficient": _near(CROSSCODER, k),
            "l1_warm_up_steps": n_steps // 4,
        },
        CROSSCODER_TOPK: {"k": k, "architecture": "crosscoder_topk"},
    }


def _near(label: str, k: int) -> float:
    at_16, exponent = _NEAR_K[label]
    return at_16 * (k / 16) ** exponent


def difference_runs(k: int, routed_blocks: Sequence[int]) -> dict[str, dict[str, Any]]:
    """RouteSAEs that differ from `ROUTE` where the paper, its code and SAELens do."""
    without_last = {"blocks": list(routed_blocks[:-1])} if len(routed_blocks) > 1 else {}
    variants: tuple[dict[str, Any], ...] = (
        {"latent_bias": False},
        {"decoder_init_norm": 0.1},
        {"decoder_norm_interval": 0},
        {"aux_loss_coefficient": 1.0},
        without_last,
    )
    return {label: {"k": k, **run} for label, run in zip(DIFFERENCES, variants, strict=True)}


# --- stages --------------------------------------------------------------------------------------


class _Stage(NamedTuple):
    """A finished sweep."""

    rows: list[dict[str, Any]]
    saes: dict[str, SAE[Any]]


def reproduce(
    what: Reproduction, model: LanguageModel | None = None, page: Path | None = None
) -> dict[str, Any]:
    """Run what is not there yet, and write `reproduction.json`, the figures and the page's tables.

    Args:
        what: What to reproduce.
        model: The language model, if it is loaded already.
        page: A Markdown file whose marked tables are rewritten.

    Returns:
        What is in `reproduction.json`.
    """
    started = time.perf_counter()
    what.output.mkdir(parents=True, exist_ok=True)
    model = _model(what.cfg) if model is None else model
    what.cfg.resolve(model)
    settings = _settings(what)
    _require_same_settings(what.output, settings)
    entries = _entries(what)
    trained = _sweep(what, model, "methods", entries)
    twins = _sweep(what, model, "share-matched", share_matched(entries, trained.rows))
    content = {
        "settings": settings,
        "methods": [row for row in trained.rows if row["label"] not in DIFFERENCES],
        "differences": [row for row in trained.rows if row["label"] in DIFFERENCES],
        "share_matched": twins.rows,
        "training_shares": _training_shares(what, trained),
        "features": _cached(what.output / "features.json", lambda: _features(what, model, trained)),
        "unscaled": _cached(what.output / "unscaled.json", lambda: _unscaled(what, model, trained)),
    }
    path = what.output / "reproduction.json"
    earlier = json.loads(path.read_text())["seconds"] if path.exists() else 0.0
    content["seconds"] = max(earlier, time.perf_counter() - started)
    path.write_text(json.dumps(content, indent=1) + "\n")
    write_figures(content, what.output)
    if page is not None:
        fill_tables(page, tables(content))
    return content


def _model(cfg: RouteSAERunnerConfig) -> LanguageModel:
    return load_model(
        cfg.model_name,
        cfg.model_class_name,
        device=cfg.llm_device or cfg.device,
        **(cfg.model_from_pretrained_kwargs or {}),
    )


def _require_same_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Raise if the folder holds stages made with other settings: they would pass for these."""
    path = folder / "settings.json"
    if not path.exists():
        path.write_text(json.dumps(settings, indent=1) + "\n")
    made_with = json.loads(path.read_text())
    for field, value in settings.items():
        if made_with.get(field) != value:
            raise ValueError(
                f"output={str(folder)!r}: was begun with {field}={made_with.get(field)!r}, not "
                f"{value!r}; give another folder or remove it"
            )


def _settings(what: Reproduction) -> dict[str, Any]:
    cfg = what.cfg
    return {
        "model_name": cfg.model_name,
        "dataset_path": cfg.dataset_path,
        "routed_blocks": cfg.routed_layers,
        "d_in": cfg.sae.d_in,
        "d_sae": cfg.sae.d_sae,
        "k": what.k,
        "other_ks": list(what.other_ks),
        "seeds": list(what.seeds),
        "training_tokens": cfg.total_training_steps * cfg.step_tokens,
        "step_tokens": cfg.step_tokens,
        "lr": cfg.lr,
        "eval_tokens": what.eval_tokens,
        "feature_tokens": what.feature_tokens,
        "torch": torch.__version__,
    }


def _entries(what: Reproduction) -> dict[str, SweepEntry]:
    """The main comparison with every seed, the other sparsities with the first."""
    cfg = what.cfg
    last_block, n_steps = (cfg.routed_layers or [0])[-1], cfg.total_training_steps
    sized = {"d_sae": cfg.sae.d_sae}

    def expanded(runs: Mapping[str, dict[str, Any]], seeds: Sequence[int]) -> Any:
        runs = {name: {**sized, **run} for name, run in runs.items()}
        return expand_runs(runs, cfg.sae.d_in, list(seeds))

    main = main_runs(what.k, cfg.sae.d_in, last_block, n_steps)
    main |= difference_runs(what.k, cfg.routed_layers or ())
    entries = {
        f"{entry.label} seed={entry.seed}": entry for entry in expanded(main, what.seeds).values()
    }
    for k in what.other_ks:
        at_k = main_runs(k, cfg.sae.d_in, last_block, n_steps)
        runs = {name: at_k[name] for name in TRADED}
        entries |= {
            f"{entry.label} k={k}": entry for entry in expanded(runs, what.seeds[:1]).values()
        }
    return entries


def _sweep(
    what: Reproduction, model: LanguageModel, name: str, entries: dict[str, SweepEntry]
) -> _Stage:
    """Train and evaluate, or read what an earlier run left; goes on from its newest checkpoint."""
    folder = what.output / name
    finished = folder / "sweep.json"
    if finished.exists():
        saes = {entry: SAE.load_from_disk(folder / entry, what.cfg.device) for entry in entries}
        return _Stage(json.loads(finished.read_text()), saes)
    whole = (folder / "checkpoints").glob(f"*/[0-9]*/{ACTIVATIONS_STORE_STATE_FILENAME}")
    checkpoints = sorted((path.parent for path in whole), key=lambda path: int(path.name))
    cfg = replace(
        what.cfg,
        output_path=str(folder),
        checkpoint_path=str(folder / "checkpoints"),
        resume_from_checkpoint=str(checkpoints[-1]) if checkpoints else None,
    )
    saes = SweepRunner(cfg, entries, override_model=cast(Any, model)).run()
    result = evaluate_sweep(model, entries, saes, what.eval_dataset, max_tokens=what.eval_tokens)
    result.write(folder)
    return _Stage(result.rows, saes)


def share_matched(
    entries: Mapping[str, SweepEntry], rows: Iterable[Mapping[str, Any]]
) -> dict[str, SweepEntry]:
    """For each router of the main comparison, a random one with its shares and seed.

    Args:
        entries: Of a sweep; routers are told by their label, the comparison by "LABEL seed=N".
        rows: Its evaluation.
    """
    twins = {}
    for row in rows:
        entry = entries[row["name"]]
        if entry.label not in ROUTERS or f"seed={entry.seed}" not in row["name"]:
            continue
        total = sum(row["share"])
        config = replace(
            entry.sae,
            routing="uniform",
            router_objective="reconstruction",
            n_routed_layers=len(row["share"]),
            layer_shares=[share / total for share in row["share"]],
            routing_seed=entry.seed,
        )  # type: ignore[call-arg]
        twins[row["name"]] = replace(entry, sae=config)
    return twins


def _cached(path: Path, make: Callable[[], Any]) -> Any:
    if not path.exists():
        path.write_text(json.dumps(make(), indent=1) + "\n")
    return json.loads(path.read_text())


def _training_shares(what: Reproduction, trained: _Stage) -> list[dict[str, Any]]:
    """Mean share of the tokens per routed layer while the routers were trained (Figure 9 a)."""
    names = {row["name"]: row for row in trained.rows if row["label"] in ROUTERS}
    logged: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with (what.output / "methods" / TRAIN_LOG_FILENAME).open() as lines:
        for record in map(json.loads, lines):
            if record["name"] in names:
                logged[record["name"]].append(record)
    return [
        {
            "label": row["label"],
            "seed": row["seed"],
            "share": [
                statistics.fmean(record[f"route_share/{i}"] for record in logged[name])
                for i in range(len(row["share"]))
            ],
        }
        for name, row in names.items()
        if name == f"{row['label']} seed={row['seed']}"
    ]


def _unscaled(what: Reproduction, model: LanguageModel, trained: _Stage) -> list[dict[str, Any]]:
    """Both conventions of the splice, for the paper's RouteSAE and for plain MSE."""
    rows = []
    for row in trained.rows:
        if row["label"] in (ROUTE, PLAIN_MSE, ASSIGNMENT) and f"seed={row['seed']}" in row["name"]:
            sae = trained.saes[row["name"]]
            result = evaluate(model, sae, what.eval_dataset, max_tokens=what.eval_tokens)
            scaled, unscaled = result.downstream, result.downstream_unscaled
            assert scaled is not None and unscaled is not None
            rows.append(
                {
                    "label": row["label"],
                    "seed": row["seed"],
                    "route_weight": row["route_weight"],
                    "kl": scaled.kl,
                    "kl_unscaled": unscaled.kl,
                }
            )
    return rows


# --- features ------------------------------------------------------------------------------------


@torch.no_grad()
def _features(what: Reproduction, model: LanguageModel, trained: _Stage) -> dict[str, Any]:
    """Interpretable features of every method, over the same text, and their ranking.

    Activations are taken in the units of n(x), x_route without p: methods whose p differ could not
    be held against one threshold otherwise. A crosscoder's are those of its stacked layers.
    """
    saes = {
        row["name"]: trained.saes[row["name"]]
        for row in trained.rows
        if row["label"] not in DIFFERENCES
    }
    widest = max(
        (sae for sae in saes.values() if isinstance(sae, RoutedSAE)),
        key=lambda sae: sae.cfg.n_routed_layers,
    )
    blocks = list(widest.cfg.metadata.routed_layers)
    text = RoutedActivationsStore.from_sae(model, cast(Any, widest), what.eval_dataset)
    norm = what.cfg.sae.d_in**0.5
    options = ContextOptions(READ_SHARE * norm, tuple(share * norm for share in THRESHOLD_SHARES))
    collectors = {
        name: ContextCollector(
            what.cfg.sae.d_in, sae.cfg.d_sae, sae.cfg.metadata.hook_names, model.tokenizer, options
        )
        for name, sae in saes.items()
    }
    total = math.ceil(
        max(1, what.feature_tokens // text.context_size) / text.store_batch_size_prompts
    )
    for tokens in tqdm(text.token_batches(what.feature_tokens), "reading features", total):
        streams = text.get_activations(tokens)
        kept = text.kept(tokens)
        for name, sae in saes.items():
            rows = [blocks.index(block) for block in sae.cfg.metadata.routed_layers]
            acts, layer, weight = _read(sae, streams[..., rows, :])
            collectors[name].add(tokens, acts, layer, weight, kept)
    rows = []
    for row in tqdm(trained.rows, "ranking features"):
        if row["name"] in saes:
            rows.append(_feature_row(what, row, collectors[row["name"]]))
    shown = f"{ASSIGNMENT} seed={what.seeds[0]}"
    by_layer = _feature_layers(what, model, cast(Any, saes[shown]), collectors[shown].table())
    return {"methods": rows, "by_layer": by_layer}


def _read(sae: SAE[Any], streams: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Feature activations in the units of n(x), and each token's layer and weight.

    A crosscoder reads all layers: it is given the last, where its splice counts.
    """
    if isinstance(sae, StackedSAE):
        acts = sae.encode_layers(streams)
        layer = torch.full(acts.shape[:-1], streams.shape[-2] - 1, device=acts.device)
        return acts, layer, torch.ones_like(acts[..., 0])
    assert isinstance(sae, RoutedSAE)
    routing = sae.route(streams)
    return sae.encode(_unscaled_input(sae, routing)), routing.layer, routing.weight


def _unscaled_input(sae: RoutedSAE, routing: Routing) -> torch.Tensor:
    """x_route in the units of n(x); under soft routing it is in these already."""
    if sae.cfg.routing == "soft":
        return routing.x_route
    return routing.x_route / routing.weight.unsqueeze(-1)


def _feature_row(
    what: Reproduction, row: Mapping[str, Any], collector: ContextCollector
) -> dict[str, Any]:
    table = collector.table()
    counts = table.run.counts
    profiles = [table.profile(feature) for feature in table.interpretable]
    scored = {table.run.options.threshold: _offline_score(table)}
    if row["label"] == ROUTE and row["seed"] == what.seeds[0]:  # Figure 5 b
        others = {count.threshold for count in counts} - set(scored)
        scored |= {threshold: _offline_score(collector.table(threshold)) for threshold in others}
    return {
        "name": row["name"],
        "label": row["label"],
        "seed": row["seed"],
        "k": row["k"],
        "l0": row["l0"],
        "thresholds": [count.threshold for count in counts],
        "n_features": [count.n_features for count in counts],
        "offline_scores": [scored.get(count.threshold) for count in counts],
        "judge_score": _judged(what, row, table),
        "more_than_4_contexts": sum(profile.n_contexts > 4 for profile in profiles),
        "at_most_32_classes": sum(profile.n_classes <= 32 for profile in profiles),
    }


def _offline_score(table: FeatureTable) -> float | None:
    scores = [score.score for score in offline_ranking(table) if score.score is not None]
    return statistics.fmean(scores) if scores else None


def _judged(what: Reproduction, row: Mapping[str, Any], table: FeatureTable) -> float | None:
    """Mean score of 100 features by the judge, for the first seed of the methods compared."""
    judged = row["label"] in SHOWN and row["seed"] == what.seeds[0]
    if what.judge is None or not judged or not table.interpretable:
        return None
    path = what.output / "judge" / f"{row['name']}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    return Judge(what.judge, base_url=what.base_url).run(table, path).summary.mean_score


@torch.no_grad()
def _feature_layers(
    what: Reproduction, model: LanguageModel, sae: RoutedSAE, table: FeatureTable
) -> dict[str, Any]:
    """How strongly features would fire at every layer, on the tokens they fire on (Figure 1).

    Word-level and pattern features are told apart by their contexts, not by their layers: features
    that fire on one token class against those that fire on the most.
    """
    text = RoutedActivationsStore.from_sae(model, sae, what.eval_dataset)
    sums = torch.zeros(sae.cfg.d_sae, sae.cfg.n_routed_layers, device=sae.device)
    total = math.ceil(
        max(1, what.feature_tokens // text.context_size) / text.store_batch_size_prompts
    )
    for tokens in tqdm(text.token_batches(what.feature_tokens), "features by layer", total):
        streams, kept = text.get_activations(tokens), text.kept(tokens)
        routing = sae.route(streams)
        acts = sae.encode(_unscaled_input(sae, routing))
        fired = (acts > 0)[kept]
        for i, stream in enumerate(streams.unbind(-2)):
            sums[:, i] += (sae.encode(normalize(stream[kept])) * fired).sum(0)
    profiles = [table.profile(feature) for feature in table.interpretable]
    profiles = [profile for profile in profiles if profile.n_contexts >= _MIN_CONTEXTS]
    profiles.sort(key=lambda profile: (profile.n_classes, -profile.max_activation))
    chosen = {"word": profiles[:_SHOWN], "pattern": profiles[::-1][:_SHOWN]}
    return {
        "n_classes": [profile.n_classes for profile in profiles],
        "mean_layer": [profile.mean_layer for profile in profiles],
        "shown": [
            {
                "kind": kind,
                **profile._asdict(),
                "activation_by_layer": (sums[profile.feature] / profile.n_fired).tolist(),
                "contexts": [
                    context.text for context in table.contexts_of(profile.feature)[:_SHOWN_CONTEXTS]
                ],
            }
            for kind, of_kind in chosen.items()
            for profile in of_kind
        ],
    }
