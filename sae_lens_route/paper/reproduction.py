"""The paper's experiments on one model, in one command.

1. *Train.* Every method on one stream of activations, a few seeds each: the main comparison,
   further sparsities, and variants of the RouteSAE where the paper and its code differ.
2. *Match.* For every router a random twin with the same share of the tokens per block, trained in a
   second sweep: the value of a partition of the tokens beyond its shares (`routing_gain`).
3. *Read.* Contexts of every method's features over the same text, and their surface score.
4. *Write.* `reproduction.json` holds all numbers; the marked tables of a Markdown page are
   rewritten from it, and figures are written as HTML and SVG.

Each stage leaves its results on disk; a finished stage is not repeated.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from sae_lens import SAE

from sae_lens_route.errors import UserError
from sae_lens_route.evals.comparison import SweepResult, evaluate_sweep
from sae_lens_route.evals.evaluate import evaluate
from sae_lens_route.models.kinds import LanguageModel
from sae_lens_route.models.load import load_model
from sae_lens_route.paper.feature_stage import read_features
from sae_lens_route.paper.figures import write_figures
from sae_lens_route.paper.markdown import fill_tables
from sae_lens_route.paper.methods import METHODS, shown_in
from sae_lens_route.paper.plan import Reproduction, Run, Settings, sweep_entries
from sae_lens_route.paper.report import tables
from sae_lens_route.paper.results import (
    Features,
    ReproductionResult,
    SpliceScales,
    Trained,
    TrainingShares,
    of_method,
)
from sae_lens_route.records import plain, typed
from sae_lens_route.training.checkpoint import newest_checkpoint
from sae_lens_route.training.entries import SweepEntry
from sae_lens_route.training.sweep import SweepRunner
from sae_lens_route.training.trainer import TRAIN_LOG_FILENAME

Numbers = TypeVar("Numbers")


class _Sweep(NamedTuple):
    """A finished sweep."""

    trained: list[Trained]
    saes: dict[Run, SAE[Any]]


def reproduce(
    reproduction: Reproduction, model: LanguageModel | None = None, page: Path | None = None
) -> ReproductionResult:
    """Run the unfinished stages, and write `reproduction.json`, the figures and the page's tables.

    Args:
        reproduction: The experiments to run.
        model: The language model, if it is loaded already.
        page: A Markdown file whose marked tables are rewritten.

    Raises:
        UserError: the output folder holds stages made with other settings.
    """
    started = time.perf_counter()
    output, cfg = reproduction.output, reproduction.cfg
    output.mkdir(parents=True, exist_ok=True)
    if model is None:
        model = load_model(
            cfg.model_name,
            cfg.model_class_name,
            device=cfg.llm_device or cfg.device,
            **(cfg.model_from_pretrained_kwargs or {}),
        )
    cfg.resolve(model)
    settings = reproduction.settings()
    _require_same_settings(output, settings)
    entries = sweep_entries(reproduction.runs(), cfg)
    sweep = _sweep(reproduction, model, "methods", entries)
    twins = _sweep(reproduction, model, "share-matched", share_matched(entries, sweep.trained))
    read = {run: sae for run, sae in sweep.saes.items() if run.stage != "differences"}
    features = _cached(
        output / "features.json", Features, lambda: read_features(reproduction, model, read)
    )
    unscaled = _cached(
        output / "unscaled.json",
        list[SpliceScales],
        lambda: _splice_scales(reproduction, model, sweep),
    )
    path = output / "reproduction.json"
    earlier = json.loads(path.read_text())["seconds"] if path.exists() else 0.0
    result = ReproductionResult(
        settings,
        [*sweep.trained, *twins.trained],
        _training_shares(output / "methods" / TRAIN_LOG_FILENAME, sweep.trained),
        features,
        unscaled,
        seconds=max(earlier, time.perf_counter() - started),
    )
    path.write_text(json.dumps(plain(result), indent=1) + "\n")
    write_figures(result, output)
    if page is not None:
        fill_tables(page, tables(result))
    return result


def _require_same_settings(folder: Path, settings: Settings) -> None:
    """Raise if the folder holds stages made with other settings: they would pass for these."""
    made_with = _cached(folder / "settings.json", dict, lambda: asdict(settings))
    for field, value in asdict(settings).items():
        if made_with.get(field) != value:
            raise UserError(
                f"output={str(folder)!r}: was begun with {field}={made_with.get(field)!r}, not "
                f"{value!r}; give another folder or remove it"
            )


def _sweep(
    reproduction: Reproduction, model: LanguageModel, name: str, entries: Mapping[Run, SweepEntry]
) -> _Sweep:
    """Train and evaluate, or read the results of an earlier run; resumes from its checkpoint."""
    folder, device = reproduction.output / name, reproduction.cfg.device
    if (folder / "sweep.json").exists():
        saes = {run: SAE.load_from_disk(folder / run.name, device) for run in entries}
        return _Sweep(_trained(entries, SweepResult.read(folder)), saes)
    checkpoint = newest_checkpoint(folder)
    cfg = replace(
        reproduction.cfg,
        output_path=str(folder),
        checkpoint_path=str(folder / "checkpoints"),
        resume_from_checkpoint=None if checkpoint is None else str(checkpoint),
    )
    by_name = {run.name: entry for run, entry in entries.items()}
    saes = SweepRunner(cfg, by_name, override_model=cast(Any, model)).run()
    result = evaluate_sweep(
        model, by_name, saes, reproduction.eval_dataset, max_tokens=reproduction.eval_tokens
    )
    result.write(folder)
    return _Sweep(_trained(entries, result), {run: saes[run.name] for run in entries})


def _trained(runs: Iterable[Run], result: SweepResult) -> list[Trained]:
    rows = {row.name: row for row in result.rows}
    return [Trained(run, rows[run.name]) for run in runs]


def share_matched(
    entries: Mapping[Run, SweepEntry], trained: Iterable[Trained]
) -> dict[Run, SweepEntry]:
    """For each router of the main comparison, a random twin with its shares and seed.

    Args:
        entries: The entries of the sweep.
        trained: Its evaluated SAEs.
    """
    twins = {}
    for each in _routers(trained):
        entry = entries[each.run]
        shares = list((each.row.share_by_block or {}).values())
        config = replace(
            entry.sae,
            routing="uniform",
            router_objective="reconstruction",
            n_routed_layers=len(shares),
            route_shares=[share / sum(shares) for share in shares],
            routing_seed=entry.seed,
        )  # type: ignore[call-arg]
        twins[replace(each.run, stage="share_matched")] = replace(entry, sae=config)
    return twins


def _cached(path: Path, kind: Callable[..., Numbers], make: Callable[[], Numbers]) -> Numbers:
    """The results of a stage, read from the file if an earlier run wrote it."""
    if not path.exists():
        path.write_text(json.dumps(plain(make()), indent=1) + "\n")
    return typed(kind, json.loads(path.read_text()))


def _routers(trained: Iterable[Trained]) -> list[Trained]:
    """The dictionaries of the main comparison whose router has a twin."""
    trained = list(trained)
    methods = [method for method in METHODS if method.has_twin]
    return [each for method in methods for each in of_method(trained, method, "main")]


def _training_shares(log: Path, trained: Iterable[Trained]) -> list[TrainingShares]:
    """Mean over the logged steps of each router's shares (Figure 9 a)."""
    logged: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with log.open() as lines:
        for record in map(json.loads, lines):
            logged[record["name"]].append(record)

    def mean_share(name: str, block: int) -> float:
        return statistics.fmean(record[f"route_share/block_{block}"] for record in logged[name])

    return [
        TrainingShares(
            each.run, {block: mean_share(each.run.name, block) for block in each.row.blocks}
        )
        for each in _routers(trained)
    ]


def _splice_scales(
    reproduction: Reproduction, model: LanguageModel, sweep: _Sweep
) -> list[SpliceScales]:
    """Both scales of the splice, for the methods of that table."""
    text, n = reproduction.eval_dataset, reproduction.eval_tokens
    scales = []
    for method in shown_in("unscaled"):
        for each in of_method(sweep.trained, method, "main"):
            evaluation = evaluate(model, sweep.saes[each.run], text, max_tokens=n)
            scaled, unscaled = evaluation.downstream, evaluation.downstream_unscaled
            assert scaled is not None and unscaled is not None
            assert each.row.route_weight is not None
            scales.append(SpliceScales(each.run, each.row.route_weight, scaled.kl, unscaled.kl))
    return scales
