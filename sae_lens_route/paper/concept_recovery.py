"""Concept recovery of saved dictionaries: what is compared, and its tables and figures over seeds.

`dictionaries_in` reads SAEs and whole sweeps from disk, `readers_of` adds the baselines, and the
tables and figures average over the seeds of a method what `recover_concepts` measured.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import plotly.graph_objects as go
from sae_lens.constants import RUNNER_CFG_FILENAME

from sae_lens_route.errors import UserError
from sae_lens_route.evals.agreement import decoder_agreement
from sae_lens_route.evals.comparison import SweepResult, SweepRow
from sae_lens_route.evals.concept_baselines import PCAReader, ResidualReader, random_dictionary
from sae_lens_route.evals.concept_readers import (
    FeatureReader,
    MultiLayerReader,
    SAEReader,
    UnionReader,
    reader_of,
)
from sae_lens_route.evals.concepts import (
    ConceptRecovery,
    ConceptScore,
    DictionaryScores,
    LevelScore,
)
from sae_lens_route.paper.statistics import interval, over_seeds
from sae_lens_route.plots import (
    Span,
    concept_depth,
    concept_recovery,
    concept_recovery_by_block,
)
from sae_lens_route.saes.metadata import routed_blocks
from sae_lens_route.saes.saved import load_saved_sae

RECOVERED = 0.5
"""The least F1 on the test half of a concept whose feature has a block worth averaging."""

_LEAST_RECOVERED = 10
"""Recovered concepts that a level needs, over all seeds, for a point in the figure of depth."""

_MULTI_LAYER = "multi_layer_topk"


class Dictionary(NamedTuple):
    """A saved SAE, or several that are read as one, and the method they belong to."""

    name: str
    """Unique among those that are compared."""
    label: str
    """The method; dictionaries that share it differ in their seed."""
    is_multi_layer: bool
    """Whether it was trained as a multi-layer SAE, which is saved as a RouteSAE."""
    saes: tuple[Any, ...]
    row: SweepRow | None = None
    """Its row of the sweep, if it is from one and a single SAE."""

    @property
    def blocks(self) -> list[int]:
        """The blocks that it reads."""
        return sorted({block for sae in self.saes for block in routed_blocks(sae)})


def dictionaries_in(folders: Iterable[Path], device: str = "cpu") -> list[Dictionary]:
    """The SAE in each folder, or all SAEs of the sweep in it.

    Raises:
        UserError: a folder holds neither, or two SAEs share a name.
    """
    found: list[Dictionary] = []
    for folder in folders:
        if (folder / "sweep.json").exists():
            for row in SweepResult.read(folder).rows:
                sae = load_saved_sae(folder / row.name, device)
                found.append(
                    Dictionary(row.name, row.label, row.architecture == _MULTI_LAYER, (sae,), row)
                )
        else:
            sae, name = load_saved_sae(folder, device), folder.resolve().name
            found.append(Dictionary(name, name, _trained_as(folder) == _MULTI_LAYER, (sae,)))
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


def read_together(dictionaries: Sequence[Dictionary], prefix: str) -> list[Dictionary]:
    """With those of one seed whose method's name begins with `prefix` read as one dictionary.

    Args:
        dictionaries: Of a sweep, among others.
        prefix: The beginning of their labels, which becomes the label of the union.

    Raises:
        UserError: no label begins so, or the dictionary is not from a sweep.
    """
    members: dict[int, list[Any]] = {}
    others = []
    for each in dictionaries:
        if not each.label.startswith(prefix):
            others.append(each)
        elif each.row is None:
            raise UserError(f"--together={prefix!r}: {each.name!r} is not from a sweep")
        else:
            members.setdefault(each.row.seed, []).extend(each.saes)
    if not members:
        labels = ", ".join(dict.fromkeys(repr(each.label) for each in dictionaries))
        raise UserError(f"--together={prefix!r}: no method begins so among {labels}")
    label = prefix.rstrip(" ,")
    return others + [
        Dictionary(f"{label} seed={seed}", label, False, tuple(saes))
        for seed, saes in members.items()
    ]


def readers_of(dictionaries: Sequence[Dictionary], baselines: bool = True) -> list[FeatureReader]:
    """A reader for each dictionary, and for what they are compared with.

    The baselines are the dimensions and principal components of the stream at the middle one of
    the blocks that are read, and a dictionary of random directions with the routes of the first.
    """
    readers: list[FeatureReader] = [_reader(each) for each in dictionaries]
    if baselines:
        saes = [sae for each in dictionaries for sae in each.saes]
        of_block = {block: sae for sae in saes for block in routed_blocks(sae)}
        block = sorted(of_block)[len(of_block) // 2]
        first = next((sae for sae in saes if hasattr(sae.cfg, "k")), None)
        readers.append(ResidualReader(f"stream, block {block}", of_block[block], block))
        readers.append(PCAReader(f"PCA, block {block}", of_block[block], block))
        if first is not None:
            readers.append(SAEReader("random directions", random_dictionary(first)))
    return readers


def _reader(dictionary: Dictionary) -> FeatureReader:
    name, (sae, *others) = dictionary.name, dictionary.saes
    if others:
        parts = [SAEReader(f"{name}, {i}", part) for i, part in enumerate(dictionary.saes)]
        return UnionReader(name, parts)
    return MultiLayerReader(name, sae) if dictionary.is_multi_layer else reader_of(name, sae)


class RecoveryReport:
    """Tables and figures of a comparison, over the seeds of each method.

    Args:
        result: What `recover_concepts` measured of the readers of `dictionaries`.
        dictionaries: What was compared.
    """

    def __init__(self, result: ConceptRecovery, dictionaries: Sequence[Dictionary]) -> None:
        self.scores = result.dictionaries
        self.levels = list(next(iter(self.scores.values())).levels)
        self.methods: dict[str, list[Dictionary]] = {}
        for each in dictionaries:
            self.methods.setdefault(each.label, []).append(each)
        trained = {each.name for each in dictionaries}
        self.baselines = [name for name in self.scores if name not in trained]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows: mean best-feature F1 by level, means over seeds with 95 % intervals.

        Dictionaries of a sweep also show its NormMSE and KL. The baselines come last, then the
        chance level: the same measured with permuted labels.
        """
        rows = [
            [
                label,
                over_seeds(each.row and each.row.norm_mse for each in runs),
                over_seeds(each.row and each.row.kl for each in runs),
                *self._cells(self._of(runs)),
                _agreement(runs),
            ]
            for label, runs in self.methods.items()
        ]
        for name in self.baselines:
            rows.append([name, "-", "-", *self._cells([self.scores[name]]), "-"])
        chance = self._chance()
        rows.append(["permuted labels", "-", "-", *(f"{c:.3f}" for c in chance.values())])
        rows[-1] += ["-"] * 4
        header = ["dictionary", "NormMSE", "KL", *chance, "precise", "dense", "dead", "twins"]
        return header, rows

    def depth_table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows: the mean block where the features of recovered concepts live, by level.

        Only dictionaries that read several blocks have a row. A concept counts from an F1 of
        `RECOVERED` on; in brackets the number of concepts over all seeds.
        """
        rows = []
        for label, runs in self._of_several_blocks().items():
            blocks = [_mean_blocks(self._of(runs), level) for level in self.levels]
            cells = [f"{statistics.fmean(b):.1f} ({len(b)})" if b else "-" for b in blocks]
            rows.append([label, *cells])
        return ["dictionary", *self.levels], rows

    def figures(self) -> dict[str, go.Figure]:
        """By the name of its file: recovery of every method, against depth, and where it lives."""
        spans = {label: self._spans(self._of(runs)) for label, runs in self.methods.items()}
        spans |= {name: self._spans([self.scores[name]]) for name in self.baselines}
        single = {runs[0].blocks[0]: label for label, runs in self._of_one_block().items()}
        several = self._of_several_blocks()
        figures = {"recovery": concept_recovery(spans, self._chance())}
        if len(single) > 1:
            for level in ("all", *self.levels):
                figures[f"recovery-by-block-{level.replace(' ', '-')}"] = concept_recovery_by_block(
                    level,
                    {block: spans[label][level] for block, label in sorted(single.items())},
                    {label: spans[label][level] for label in several},
                )
        depths = {label: self._depths(self._of(runs)) for label, runs in several.items()}
        if any(depths.values()):
            figures["depth"] = concept_depth(depths)
        return figures

    def _depths(self, runs: Sequence[DictionaryScores]) -> dict[str, float]:
        """The mean block of recovered concepts at each level that has enough of them."""
        blocks = {level: _mean_blocks(runs, level) for level in self.levels}
        return {
            level: statistics.fmean(of_level)
            for level, of_level in blocks.items()
            if len(of_level) >= _LEAST_RECOVERED
        }

    def _of(self, runs: Sequence[Dictionary]) -> list[DictionaryScores]:
        return [self.scores[each.name] for each in runs]

    def _of_one_block(self) -> dict[str, list[Dictionary]]:
        """The first method at each single block: variants of it have no place on a curve."""
        of_block: dict[int, str] = {}
        for label, runs in self.methods.items():
            if len(runs[0].blocks) == 1:
                of_block.setdefault(runs[0].blocks[0], label)
        return {label: self.methods[label] for label in of_block.values()}

    def _of_several_blocks(self) -> dict[str, list[Dictionary]]:
        return {label: runs for label, runs in self.methods.items() if len(runs[0].blocks) > 1}

    def _chance(self) -> dict[str, float]:
        def mean(of: Callable[[DictionaryScores], LevelScore]) -> float:
            return statistics.fmean(of(scores).f1_shuffled for scores in self.scores.values())

        by_level = {level: mean(lambda s, at=level: s.levels[at]) for level in self.levels}
        return {**by_level, "all": mean(lambda s: s.overall)}

    def _cells(self, runs: Sequence[DictionaryScores]) -> list[str]:
        return [
            *(over_seeds(run.levels[level].f1 for run in runs) for level in self.levels),
            over_seeds(run.overall.f1 for run in runs),
            over_seeds((run.overall.precise_features for run in runs), ".0f"),
            over_seeds((run.dense_features for run in runs), ".0f"),
            over_seeds((run.dead_features for run in runs), ".0f"),
        ]

    def _spans(self, runs: Sequence[DictionaryScores]) -> dict[str, Span]:
        def span(of: Callable[[DictionaryScores], LevelScore]) -> Span:
            if len(runs) == 1:
                return Span(of(runs[0]).f1, *of(runs[0]).f1_interval)
            return interval([of(run).f1 for run in runs]).span

        by_level = {level: span(lambda s, at=level: s.levels[at]) for level in self.levels}
        return {**by_level, "all": span(lambda s: s.overall)}


def _mean_blocks(runs: Iterable[DictionaryScores], level: str) -> list[float]:
    def counts(concept: ConceptScore) -> bool:
        return concept.level == level and concept.f1 >= RECOVERED

    return [
        concept.mean_block
        for run in runs
        for concept in run.concepts
        if counts(concept) and concept.mean_block is not None
    ]


def _agreement(runs: Sequence[Dictionary]) -> str:
    """Share of the features with a twin in another seed's dictionary, mean over pairs of seeds."""
    shares = [
        decoder_agreement(sae, other).twin_share
        for one, another in itertools.permutations(runs, 2)
        for sae, other in zip(one.saes, another.saes, strict=True)
    ]
    return f"{statistics.fmean(shares):.2f}" if shares else "-"
