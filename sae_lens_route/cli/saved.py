"""What a command reads: a saved SAE, held-out text, features and scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from sae_lens_route.errors import UserError, reading_errors

if TYPE_CHECKING:
    from sae_lens_route.features.judge_prompt import Answer
    from sae_lens_route.features.surface_score import SurfaceScore
    from sae_lens_route.features.table import FeatureTable
    from sae_lens_route.saes.crosscoder import CrosscoderSAEMixin
    from sae_lens_route.saes.routed import RoutedSAEMixin


def load_sae(path: Path, device: str) -> RoutedSAEMixin | CrosscoderSAEMixin:
    """A saved RouteSAE or crosscoder; a UserError if the folder or the device is another."""
    from sae_lens_route.memory import require_device
    from sae_lens_route.saes.saved import load_saved_sae

    require_device(device)
    return load_saved_sae(path, device)


def load_routed_sae(path: Path, device: str, command: str) -> RoutedSAEMixin:
    """A saved RouteSAE, for a command that needs its router; a UserError for a crosscoder."""
    from sae_lens_route.saes.routed import RoutedSAEMixin

    sae = load_sae(path, device)
    if not isinstance(sae, RoutedSAEMixin):
        raise UserError(
            f"PATH={str(path)!r}: a crosscoder reads all blocks at once and has no routes, so "
            f"`{command}` does not take it; `eval` and `info` do"
        )
    return sae


def held_out_text(dataset: str | None, trained_on: str | None) -> str:
    """The text to evaluate on: the one given, or else the demo corpus's held-out half.

    Raises:
        UserError: None is given, and the SAE was trained on another text than the demo corpus.
    """
    if dataset is not None:
        return dataset
    if trained_on == "demo":
        return "demo:heldout"
    raise UserError(f"--dataset: name held-out text; training reads {trained_on!r}")


def read_feature_table(folder: Path) -> FeatureTable:
    """The features and contexts that `features` wrote to a folder; a UserError without them."""
    from sae_lens_route.features.table import FeatureTable

    if not (folder / "features.parquet").exists():
        raise UserError(f"PATH={str(folder)!r}: no features.parquet there; `features` writes one")
    return FeatureTable.from_parquet(folder)


def read_answers(path: Path) -> dict[int, Answer]:
    """The answers of one judge: of a model (JSONL, as `interpret` writes) or a person (CSV sheet).

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    from sae_lens_route.features.judge_results import answers, read_results
    from sae_lens_route.features.raters import read_sheet

    if not path.is_file():
        raise UserError(f"{str(path)!r}: no such file; `interpret --model` writes a judge.jsonl")
    return answers(read_results(path)) if path.suffix == ".jsonl" else read_sheet(path)


def read_scores(folder: Path) -> dict[int, Answer | SurfaceScore]:
    """The scores that `interpret` wrote to a folder: a judge's, or else surface scores."""
    from sae_lens_route.features.judge_results import answers, read_results
    from sae_lens_route.features.surface_score import SurfaceScore

    judged, ranked = folder / "judge.jsonl", folder / "surface_ranking.json"
    if judged.exists():
        return {**answers(read_results(judged))}
    with reading_errors(repr(str(ranked))):
        rows = json.loads(ranked.read_text())["features"] if ranked.exists() else []
    return {row["feature"]: SurfaceScore(**row) for row in rows}
