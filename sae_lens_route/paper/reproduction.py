"""The paper's experiments on one model, in one command.

1. *Search.* The learning rate of each method, and the penalties that bring methods without k to the
   wanted L0.
2. *Train.* Every method on one stream of activations, a few seeds each: the main comparison,
   further sparsities, and variants of the RouteSAE where the paper and its code differ.
3. *Match.* For every router a random twin with the same share of the tokens per block, trained in a
   second sweep: the value of a partition of the tokens beyond its shares (`routing_gain`).
4. *Read.* Contexts of every method's features over the same text, and their surface score.
5. *Write.* `reproduction.json` holds all numbers; the marked tables of a Markdown page are
   rewritten from it, and figures are written as HTML and SVG.

Each stage leaves its results on disk, and trains in groups that fit in memory (`stages.py`): what
is finished is not repeated, and an interrupted group resumes. Tables are made on the half of the
held-out text that no choice was made on (`held_out.py`).
"""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from sae_lens import SAE

from sae_lens_route.data.reading import Text
from sae_lens_route.errors import UserError
from sae_lens_route.evals.evaluate import evaluate
from sae_lens_route.models.kinds import LanguageModel
from sae_lens_route.paper.feature_stage import read_features
from sae_lens_route.paper.figures import write_figures
from sae_lens_route.paper.held_out import split_held_out
from sae_lens_route.paper.learning_rates import best_learning_rates, try_learning_rates
from sae_lens_route.paper.markdown import fill_tables
from sae_lens_route.paper.methods import METHODS, shown_in
from sae_lens_route.paper.penalties import find_penalties
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
from sae_lens_route.paper.stages import Group, cached, groups_of
from sae_lens_route.records import as_json
from sae_lens_route.training.entries import SweepEntry
from sae_lens_route.training.runner import load_model_of_run


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
    validation, text = split_held_out(reproduction.eval_dataset)
    if model is None:
        model = load_model_of_run(cfg)
    cfg.resolve(model)
    # SAELens's loss for dead features can act only once a feature has not fired for this long
    cfg.dead_feature_window = min(cfg.dead_feature_window, max(1, cfg.total_training_steps // 4))
    settings = reproduction.settings()
    _require_same_settings(output, settings)

    def trained(stage: str, entries: Mapping[Run, SweepEntry]) -> tuple[list[Group], list[Trained]]:
        groups = groups_of(output / stage, cfg, entries, reproduction.memory)
        done = [group.evaluated(cfg, model, text, reproduction.eval_tokens) for group in groups]
        return groups, [each for of_group in done for each in of_group]

    trials = try_learning_rates(reproduction, model, validation)
    rates = best_learning_rates(trials)
    penalties = find_penalties(reproduction, model, validation, rates)
    entries = sweep_entries(reproduction.runs(), cfg, penalties, rates)
    groups, methods = trained("methods", entries)
    _, twins = trained("share-matched", share_matched(entries, methods))
    features = [
        cached(
            group.folder / "features.json",
            Features,
            partial(_features, reproduction, model, text, group),
        )
        for group in groups
    ]
    unscaled = cached(
        output / "unscaled.json",
        list[SpliceScales],
        lambda: _splice_scales(reproduction, model, text, groups, methods),
    )
    path = output / "reproduction.json"
    earlier = json.loads(path.read_text())["seconds"] if path.exists() else 0.0
    result = ReproductionResult(
        settings,
        trials,
        [*methods, *twins],
        _training_shares((record for group in groups for record in group.log()), methods),
        Features.of_groups(features),
        unscaled,
        seconds=max(earlier, time.perf_counter() - started),
    )
    path.write_text(as_json(result), encoding="utf-8")
    write_figures(result, output)
    if page is not None:
        fill_tables(page, tables(result))
    return result


def _require_same_settings(folder: Path, settings: Settings) -> None:
    """Raise if the folder holds stages made with other settings: they would pass for these."""
    made_with = cached(folder / "settings.json", dict, lambda: asdict(settings))
    for field, value in asdict(settings).items():
        if made_with.get(field) != value:
            raise UserError(
                f"output={str(folder)!r}: was begun with {field}={made_with.get(field)!r}, not "
                f"{value!r}; give another folder or remove it"
            )


def _features(
    reproduction: Reproduction, model: LanguageModel, text: Text, group: Group
) -> Features:
    saes = group.saes(reproduction.cfg.device)
    read = {run: sae for run, sae in saes.items() if run.stage != "differences"}
    return read_features(reproduction, model, text, read)


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


def _routers(trained: Iterable[Trained]) -> list[Trained]:
    """The dictionaries of the main comparison whose router has a twin."""
    trained = list(trained)
    methods = [method for method in METHODS if method.has_twin]
    return [each for method in methods for each in of_method(trained, method, "main")]


def _training_shares(
    log: Iterable[Mapping[str, Any]], trained: Iterable[Trained]
) -> list[TrainingShares]:
    """Mean over the logged steps of each router's shares (Figure 9 a)."""
    logged: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for record in log:
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
    reproduction: Reproduction,
    model: LanguageModel,
    text: Text,
    groups: Iterable[Group],
    trained: Iterable[Trained],
) -> list[SpliceScales]:
    """Both scales of the splice, for the methods of that table."""
    trained = list(trained)
    folders = {run: group.folder / run.name for group in groups for run in group.entries}
    scales = []
    for method in shown_in("unscaled"):
        for each in of_method(trained, method, "main"):
            sae = SAE.load_from_disk(folders[each.run], reproduction.cfg.device)
            evaluation = evaluate(model, sae, text, max_tokens=reproduction.eval_tokens)
            scaled, unscaled = evaluation.downstream, evaluation.downstream_unscaled
            assert scaled is not None and unscaled is not None
            assert each.row.route_weight is not None
            scales.append(SpliceScales(each.run, each.row.route_weight, scaled.kl, unscaled.kl))
    return scales
