"""Concept recovery of saved dictionaries: what is compared, and the table over seeds.

`dictionaries_in` reads SAEs and whole sweeps from disk, `readers_of` adds the baselines, and
`recovery_table` averages over the seeds of a method what `recover_concepts` measured.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sae_lens.constants import RUNNER_CFG_FILENAME

from sae_lens_route.errors import UserError
from sae_lens_route.evals.agreement import decoder_agreement
from sae_lens_route.evals.comparison import SweepResult
from sae_lens_route.evals.concept_baselines import PCAReader, ResidualReader, random_dictionary
from sae_lens_route.evals.concept_readers import (
    FeatureReader,
    MultiLayerReader,
    SAEReader,
    reader_of,
)
from sae_lens_route.evals.concepts import ConceptRecovery, DictionaryScores
from sae_lens_route.paper.statistics import interval
from sae_lens_route.saes.metadata import routed_blocks
from sae_lens_route.saes.saved import load_saved_sae

RECOVERED = 0.5
"""The least F1 on the test half of a concept whose feature has a block worth averaging."""

_MULTI_LAYER = "multi_layer_topk"


class Dictionary(NamedTuple):
    """A saved SAE and the method it belongs to."""

    name: str
    """Unique among those that are compared."""
    label: str
    """The method; dictionaries that share it differ in their seed."""
    architecture: str
    """It was trained as; a multi-layer SAE is saved as another."""
    sae: Any


def dictionaries_in(folders: Iterable[Path], device: str = "cpu") -> list[Dictionary]:
    """The SAE in each folder, or all SAEs of the sweep in it.

    Raises:
        UserError: a folder holds neither, or two SAEs share a name.
    """
    found: list[Dictionary] = []
    for folder in folders:
        if (folder / "sweep.json").exists():
            found += [
                Dictionary(
                    row.name,
                    row.label,
                    row.architecture,
                    load_saved_sae(folder / row.name, device),
                )
                for row in SweepResult.read(folder).rows
            ]
        else:
            sae, name = load_saved_sae(folder, device), folder.resolve().name
            found.append(Dictionary(name, name, _trained_as(folder), sae))
    names = [each.name for each in found]
    if len(set(names)) < len(names):
        raise UserError(f"two dictionaries share a name among {', '.join(names)}: rename a folder")
    return found


def _trained_as(folder: Path) -> str:
    path = folder / RUNNER_CFG_FILENAME
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["sae"]["architecture"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def readers_of(dictionaries: Sequence[Dictionary], baselines: bool = True) -> list[FeatureReader]:
    """A reader for each dictionary, and for what they are compared with.

    The baselines are the dimensions and principal components of the stream at the middle one of
    the blocks that are read, and a dictionary of random directions with the routes of the first.
    """
    readers: list[FeatureReader] = [
        MultiLayerReader(each.name, each.sae)
        if each.architecture == _MULTI_LAYER
        else reader_of(each.name, each.sae)
        for each in dictionaries
    ]
    if baselines:
        of_block = {block: each.sae for each in dictionaries for block in routed_blocks(each.sae)}
        block = sorted(of_block)[len(of_block) // 2]
        first = next((d.sae for d in dictionaries if hasattr(d.sae.cfg, "k")), None)
        readers.append(ResidualReader(f"stream, block {block}", of_block[block], block))
        readers.append(PCAReader(f"PCA, block {block}", of_block[block], block))
        if first is not None:
            readers.append(SAEReader("random directions", random_dictionary(first)))
    return readers


def recovery_table(
    result: ConceptRecovery, dictionaries: Sequence[Dictionary]
) -> tuple[list[str], list[list[str]]]:
    """Header and rows: mean best-feature F1 by level, means over seeds with 95 % intervals.

    The baselines come last, then the chance level: the same measured with permuted labels.
    """
    scores = result.dictionaries
    levels = list(next(iter(scores.values())).levels)
    labels: dict[str, list[Dictionary]] = {}
    for each in dictionaries:
        labels.setdefault(each.label, []).append(each)
    rows = [
        [label, *_cells([scores[each.name] for each in runs], levels), _agreement(runs)]
        for label, runs in labels.items()
    ]
    trained = {each.name for each in dictionaries}
    rows += [
        [name, *_cells([of_name], levels), "-"]
        for name, of_name in scores.items()
        if name not in trained
    ]
    chance = [
        statistics.fmean(s.levels[level].f1_shuffled for s in scores.values()) for level in levels
    ]
    overall = statistics.fmean(s.overall.f1_shuffled for s in scores.values())
    rows.append(["permuted labels", *(f"{c:.3f}" for c in (*chance, overall)), *["-"] * 4])
    header = ["dictionary", *levels, "all", "precise", "dense", "dead", "twins"]
    return header, rows


def _cells(runs: Sequence[DictionaryScores], levels: Sequence[str]) -> list[str]:
    def shown(values: Iterable[float], form: str) -> str:
        return interval(list(values)).show(form)

    return [
        *(shown((run.levels[level].f1 for run in runs), ".3f") for level in levels),
        shown((run.overall.f1 for run in runs), ".3f"),
        shown((float(run.overall.precise_features) for run in runs), ".0f"),
        shown((float(run.dense_features) for run in runs), ".0f"),
        shown((float(run.dead_features) for run in runs), ".0f"),
    ]


def _agreement(runs: Sequence[Dictionary]) -> str:
    """Share of the features with a twin in another seed's dictionary, mean over pairs of seeds."""
    pairs = list(itertools.permutations([each.sae for each in runs], 2))
    if not pairs:
        return "-"
    return f"{statistics.fmean(decoder_agreement(*pair).twin_share for pair in pairs):.2f}"


def depth_table(
    result: ConceptRecovery, dictionaries: Sequence[Dictionary]
) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the mean block where the features of recovered concepts live, by level.

    Only dictionaries that read several blocks have a row. A concept counts from an F1 of
    `RECOVERED` on; in brackets the number of concepts over all seeds.
    """
    labels: dict[str, list[DictionaryScores]] = {}
    for each in dictionaries:
        if len(routed_blocks(each.sae)) > 1:
            labels.setdefault(each.label, []).append(result.dictionaries[each.name])
    levels = list(next(iter(result.dictionaries.values())).levels)
    rows = []
    for label, runs in labels.items():
        row = [label]
        for level in levels:
            blocks = [
                concept.mean_block
                for run in runs
                for concept in run.concepts
                if concept.level == level
                and concept.f1 >= RECOVERED
                and concept.mean_block is not None
            ]
            row.append(f"{statistics.fmean(blocks):.1f} ({len(blocks)})" if blocks else "-")
        rows.append(row)
    return ["dictionary", *levels], rows
