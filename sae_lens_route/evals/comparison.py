"""The table of a sweep: one typed row for each SAE, all evaluated on the same held-out text.

`evaluate_sweep` makes the rows, with one clean forward pass of the model for all SAEs. A
`SweepResult` is written as JSON, which is read back as the same rows, and flat as CSV and parquet:
a number per block is a column per block, `share_by_block[9]` being `share_block_9`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from sae_lens import SAE
from sae_lens.saes.sae import TrainingSAEConfig

from sae_lens_route.data.reading import Text
from sae_lens_route.errors import UserError
from sae_lens_route.evals.downstream import DownstreamMetrics
from sae_lens_route.evals.evaluate import ContextMeans, Evaluation, evaluate_all
from sae_lens_route.evals.reconstruction import CrosscoderMetrics, ReconstructionMetrics
from sae_lens_route.models.kinds import LanguageModel
from sae_lens_route.records import as_json, plain, typed
from sae_lens_route.saes.kinds import SPARSITY_FIELDS
from sae_lens_route.saes.metadata import routed_blocks
from sae_lens_route.training.entries import SweepEntry

Cell = str | int | float | None
"""A value of the flat table."""


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """The training settings that a comparison is about; None where an architecture has no such."""

    routing: str | None = None
    aggregation: str | None = None
    loss: str | None = None
    router_objective: str | None = None
    k: int | float | None = None
    l1_coefficient: int | float | None = None
    l0_coefficient: int | float | None = None
    target_l0: int | float | None = None

    @classmethod
    def of(cls, config: TrainingSAEConfig) -> SweepSettings:
        """The settings of a training configuration."""
        return cls(**{name: getattr(config, name, None) for name in cls.__dataclass_fields__})


@dataclass(frozen=True, kw_only=True)
class SweepRow:
    """One SAE of a sweep: the settings it was trained with, and its metrics."""

    name: str
    """The entry's name, unique in the sweep."""
    label: str
    """The method, as tables and figures call it; runs of one label differ in seed or sparsity."""
    seed: int
    architecture: str
    """SAELens's name of the training architecture."""
    blocks: list[int]
    """The routed blocks."""
    d_sae: int
    n_parameters: int
    """Parameters in use: with a single routed block the router has no choice, and none."""
    settings: SweepSettings
    reconstruction: ReconstructionMetrics | CrosscoderMetrics
    downstream: DownstreamMetrics | None
    """None under soft routing."""
    lr: float | None = None
    """Its own peak learning rate; None where it is the sweep's."""
    by_context: ContextMeans | None = None
    """NormMSE and KL of each context; None in results that predate this field."""

    @property
    def l0(self) -> float:
        """Active features per token."""
        return self.reconstruction.l0

    @property
    def norm_mse(self) -> float:
        """NormMSE under the trained routing."""
        return self.reconstruction.norm_mse

    @property
    def kl(self) -> float | None:
        """KL(clean || spliced), nats per token; None under soft routing."""
        return None if self.downstream is None else self.downstream.kl

    @property
    def share_by_block(self) -> dict[int, float] | None:
        """Share of the tokens routed to each block; None for a crosscoder."""
        metrics = self.reconstruction
        return None if isinstance(metrics, CrosscoderMetrics) else metrics.share_by_block

    @property
    def route_weight(self) -> float | None:
        """Mean weight of the chosen block; None for a crosscoder."""
        metrics = self.reconstruction
        return None if isinstance(metrics, CrosscoderMetrics) else metrics.route_weight

    @property
    def sparsity(self) -> tuple[int | float | None, ...]:
        """The settings named in `SPARSITY_FIELDS`: equal for runs that differ only in seed."""
        return tuple(getattr(self.settings, name) for name in SPARSITY_FIELDS)

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries, for JSON."""
        return plain(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SweepRow:
        """The row that `to_dict` or its JSON describes."""
        return typed(cls, values)

    def flat(self) -> dict[str, Cell]:
        """One value for each column of the flat table; `blocks` is text such as "2 5 9"."""
        nested = self.to_dict()
        del nested["by_context"]
        parts = [nested.pop(name) or {} for name in ("settings", "reconstruction", "downstream")]
        columns: dict[str, Cell] = {**nested, "blocks": " ".join(map(str, self.blocks))}
        for part in parts:
            for name, value in part.items():
                if isinstance(value, dict):
                    stem = name.removesuffix("_by_block").removesuffix("_block")
                    columns.update({f"{stem}_block_{block}": v for block, v in value.items()})
                else:
                    columns[name] = value
        return columns


class SweepResult(NamedTuple):
    """The rows of a sweep, one for each entry."""

    rows: list[SweepRow]

    def write(self, folder: str | Path) -> list[Path]:
        """Write `sweep.json` (nested), `sweep.csv` and `sweep.parquet` (flat).

        Returns:
            The three paths.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"sweep.{suffix}" for suffix in ("json", "csv", "parquet")]
        paths[0].write_text(as_json(self.rows), encoding="utf-8")
        flat = [row.flat() for row in self.rows]
        columns = list(dict.fromkeys(column for row in flat for column in row))
        table = pa.table({column: [row.get(column) for row in flat] for column in columns})
        pa_csv.write_csv(table, paths[1])
        pq.write_table(table, paths[2])
        return paths

    @classmethod
    def read(cls, folder: str | Path) -> SweepResult:
        """The rows that `write` left in `folder`, from `sweep.json`.

        Raises:
            UserError: there is no such file, or it does not hold rows of a sweep.
        """
        path = Path(folder) / "sweep.json"
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
            return cls([SweepRow.from_dict(row) for row in rows])
        except FileNotFoundError as error:
            raise UserError(f"{path}: no such file; give the folder of a finished sweep") from error
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: not the table of a sweep ({error!r})") from error


def evaluate_sweep(
    model: LanguageModel,
    entries: Mapping[str, SweepEntry],
    saes: Mapping[str, SAE[Any]],
    text: Text,
    *,
    max_tokens: int = 50_000,
    batch_size: int = 8,
) -> SweepResult:
    """Evaluate the SAEs of a sweep on the same held-out text.

    Args:
        model: The model the SAEs were trained on.
        entries: The entries of the sweep by name.
        saes: The trained SAE of each entry, as `SweepRunner.run` returns them.
        text: The text to read.
        max_tokens: Tokens to read, excluded ones included.
        batch_size: Contexts in one forward pass.
    """
    evaluations = evaluate_all(model, saes, text, max_tokens=max_tokens, batch_size=batch_size)
    return SweepResult(
        [_row(name, entry, saes[name], evaluations[name]) for name, entry in entries.items()]
    )


def _row(name: str, entry: SweepEntry, sae: SAE[Any], evaluation: Evaluation) -> SweepRow:
    return SweepRow(
        name=name,
        label=entry.label or name,
        seed=entry.seed,
        architecture=entry.sae.architecture(),
        blocks=routed_blocks(sae),
        d_sae=entry.sae.d_sae,
        n_parameters=_n_parameters(sae),
        settings=SweepSettings.of(entry.sae),
        reconstruction=evaluation.reconstruction,
        downstream=evaluation.downstream,
        lr=entry.lr,
        by_context=evaluation.by_context,
    )


def _n_parameters(sae: SAE[Any]) -> int:
    counts = {name: parameter.numel() for name, parameter in sae.named_parameters()}
    if len(routed_blocks(sae)) == 1:
        counts.pop("W_router", None)
    return sum(counts.values())
