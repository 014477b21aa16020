"""Training many dictionaries in groups that fit in memory, each of them resumed.

A group is a sweep in a folder of its own; the groups of a stage read the same text in the same
order. They are divided once and noted in `groups.json`, so that a run that is started again on a
machine with other memory goes on with what it has.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME

from sae_lens_route.config import RouteSAERunnerConfig
from sae_lens_route.data.reading import Text
from sae_lens_route.errors import UserError
from sae_lens_route.evals.comparison import SweepResult, evaluate_sweep
from sae_lens_route.evals.evaluate import evaluate_all
from sae_lens_route.evals.reconstruction import CrosscoderMetrics, ReconstructionMetrics
from sae_lens_route.files import write_json
from sae_lens_route.memory import free_memory
from sae_lens_route.models.kinds import LanguageModel
from sae_lens_route.paper.plan import Run
from sae_lens_route.paper.results import Trained
from sae_lens_route.records import plain, typed
from sae_lens_route.training.checkpoint import newest_checkpoint
from sae_lens_route.training.entries import SweepEntry
from sae_lens_route.training.sweep import SweepRunner, sweep_memory
from sae_lens_route.training.trainer import TRAIN_LOG_FILENAME

GROUPS_FILENAME = "groups.json"

_SHARE = 0.75
"""Of the free memory that a group may take: the language model's passes need some, too."""

Numbers = TypeVar("Numbers")


def cached(path: Path, kind: Callable[..., Numbers], make: Callable[[], Numbers]) -> Numbers:
    """The results of a step, read from the file if an earlier run wrote it."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, plain(make()))
    return typed(kind, json.loads(path.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Group:
    """Dictionaries that are trained together."""

    folder: Path
    entries: dict[Run, SweepEntry]

    def train(self, cfg: RouteSAERunnerConfig, model: LanguageModel) -> dict[Run, SAE[Any]]:
        """Train the group, resume its training, or load what an earlier run trained."""
        if all((self.folder / run.name / SAE_CFG_FILENAME).exists() for run in self.entries):
            return self.saes(cfg.device)
        checkpoint = newest_checkpoint(self.folder)
        cfg = replace(
            cfg,
            output_path=str(self.folder),
            checkpoint_path=str(self.folder / "checkpoints"),
            resume_from_checkpoint=None if checkpoint is None else str(checkpoint),
        )
        by_name = {run.name: entry for run, entry in self.entries.items()}
        saes = SweepRunner(cfg, by_name, override_model=cast(Any, model)).run()
        return {run: saes[run.name] for run in self.entries}

    def saes(self, device: str) -> dict[Run, SAE[Any]]:
        """The trained dictionaries, from disk."""
        return {run: SAE.load_from_disk(self.folder / run.name, device) for run in self.entries}

    def evaluated(
        self, cfg: RouteSAERunnerConfig, model: LanguageModel, text: Text, max_tokens: int
    ) -> list[Trained]:
        """Train the group and evaluate it, or read what an earlier run found."""
        if not (self.folder / "sweep.json").exists():
            saes = self.train(cfg, model)
            by_name = {run.name: entry for run, entry in self.entries.items()}
            named = {run.name: sae for run, sae in saes.items()}
            result = evaluate_sweep(model, by_name, named, text, max_tokens=max_tokens)
            result.write(self.folder)
        rows = {row.name: row for row in SweepResult.read(self.folder).rows}
        return [Trained(run, rows[run.name]) for run in self.entries]

    def reconstructed(
        self, cfg: RouteSAERunnerConfig, model: LanguageModel, text: Text, max_tokens: int
    ) -> dict[Run, ReconstructionMetrics | CrosscoderMetrics]:
        """Train the group, and measure how it reconstructs a text, without a splice."""
        saes = {run.name: sae for run, sae in self.train(cfg, model).items()}
        found = evaluate_all(model, saes, text, max_tokens=max_tokens, splice=False)
        return {run: found[run.name].reconstruction for run in self.entries}

    def log(self) -> Iterator[dict[str, Any]]:
        """The records of its training log."""
        with (self.folder / TRAIN_LOG_FILENAME).open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def groups_of(
    folder: Path,
    cfg: RouteSAERunnerConfig,
    entries: Mapping[Run, SweepEntry],
    memory: int | None = None,
) -> list[Group]:
    """Divide dictionaries into groups, in order, or as an earlier run divided them.

    Args:
        folder: Folder of the stage; each group has a folder in it.
        cfg: Configuration of the sweeps, resolved against the model.
        entries: What to train; names are unique.
        memory: Bytes that a group may take; None takes three quarters of what is free.

    Raises:
        UserError: an earlier run trained other dictionaries in this folder.
    """
    by_name = {run.name: run for run in entries}
    names = cached(
        folder / GROUPS_FILENAME, list[list[str]], lambda: _divided(cfg, entries, memory)
    )
    if sorted(name for group in names for name in group) != sorted(by_name):
        raise UserError(
            f"output={str(folder)!r}: holds other dictionaries; give another folder or remove it"
        )
    return [
        Group(folder / str(i), {by_name[name]: entries[by_name[name]] for name in group})
        for i, group in enumerate(names, start=1)
    ]


def _divided(
    cfg: RouteSAERunnerConfig, entries: Mapping[Run, SweepEntry], memory: int | None
) -> list[list[str]]:
    """Names by group, each as many as fit; a dictionary that does not is a group of its own."""
    if memory is None:
        free = free_memory(cfg.device)
        memory = None if free is None else int(_SHARE * free)
    groups: list[dict[str, SweepEntry]] = [{}]
    for run, entry in entries.items():
        more = {**groups[-1], run.name: entry}
        if groups[-1] and memory is not None and sum(sweep_memory(cfg, more).values()) > memory:
            groups.append({run.name: entry})
        else:
            groups[-1] = more
    return [list(group) for group in groups]
