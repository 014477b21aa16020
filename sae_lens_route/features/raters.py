"""Scores by people: sheets to fill in, and how far two judges agree (Figure 7)."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from scipy.stats import rankdata

from sae_lens_route.errors import UserError, reading_errors
from sae_lens_route.features.judge_prompt import CATEGORIES, MAX_CONTEXTS, SCORES, Answer, Category
from sae_lens_route.features.table import FeatureTable

_SHEET_COLUMNS = ("feature", "category", "score", "explanation", "contexts")

_MAX_CELL = 32_000  # the limit of spreadsheets is 32,767 characters


def write_sheet(
    table: FeatureTable, features: Iterable[int], path: str | Path, max_contexts: int = MAX_CONTEXTS
) -> None:
    """Write a CSV sheet for a person to fill in: one row per feature, `category` and `score` blank.

    A row shows as many of the feature's strongest contexts as fit into a spreadsheet's cell, and no
    scores of other judges.
    """
    with Path(path).open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_SHEET_COLUMNS)
        for feature in features:
            cell = ""
            for i, c in enumerate(table.contexts_of(feature)[:max_contexts]):
                text = " ".join(c.text.replace("\0", " ").split())
                line = f"{i + 1}. {c.token.strip()!r} {c.activation:.2f}: {text}\n"
                if len(cell) + len(line) > _MAX_CELL:
                    break
                cell += line
            writer.writerow([feature, "", "", "", cell.rstrip()])


def read_sheet(path: str | Path) -> dict[int, Answer]:
    """The answers of a filled-in sheet, skipping rows without category and score.

    Columns may be separated by commas, semicolons or tabs, as spreadsheets save all three.

    Raises:
        UserError: the file cannot be read, a column is missing, a feature is a duplicate, or a row
            does not have both a category and a whole number from 1 to 5.
    """
    with (
        reading_errors(repr(str(path))),
        Path(path).open(encoding="utf-8-sig", newline="") as file,
    ):
        header = file.readline()
        separator = next((c for c in header if c in ",;\t"), ",")
        file.seek(0)
        rows = csv.DictReader(file, delimiter=separator)
        if missing := set(_SHEET_COLUMNS[:4]) - set(rows.fieldnames or ()):
            raise UserError(f"{str(path)!r}: missing columns: {', '.join(sorted(missing))}")
        scored: dict[int, Answer] = {}
        seen: set[str] = set()
        for row in rows:
            feature, category, score, explanation = (
                (row[name] or "").strip() for name in _SHEET_COLUMNS[:4]
            )
            where = f"{str(path)!r}, feature {feature!r}"
            if not feature.isdecimal() or feature in seen:
                raise UserError(f"{where}: must be a whole number without duplicates")
            seen.add(feature)
            if not category and not score:
                continue
            known: dict[str, Category] = {name: name for name in CATEGORIES}
            if (name := known.get(category.lower())) is None:
                raise UserError(
                    f"{where}: category={category!r}: must be one of {', '.join(CATEGORIES)}"
                )
            if score not in map(str, SCORES):
                raise UserError(f"{where}: score={score!r}: must be a whole number from 1 to 5")
            scored[int(feature)] = Answer(name, int(score), explanation)
    return scored


class Agreement(NamedTuple):
    """How far two judges agree on the features that both scored (the paper's Figure 7).

    Undefined values are None: all but the counts without common features, and the correlations if
    one judge gives every feature the same score.
    """

    n: int
    """Features that both scored."""
    exact: float | None
    """Share with the same score."""
    within_one: float | None
    """Share whose scores differ by at most 1."""
    same_category: float | None
    pearson: float | None
    spearman: float | None
    """Pearson correlation of the ranks; tied scores share their mean rank."""
    kappa: float | None
    """Cohen's kappa with linear weights: 1 - observed / expected mean difference of the scores.
    The expectation is that of independent judges with the same score frequencies."""
    mean_difference: float | None
    """Mean of the second judge's score minus the first's."""
    counts: list[list[int]]
    """`counts[i][j]`: features the first judge scored i + 1 and the second j + 1."""


def agreement(first: Mapping[int, Answer], second: Mapping[int, Answer]) -> Agreement:
    """Compare two judges, each a model (`answers(run.results)`) or a person (`read_sheet`)."""
    common = sorted(first.keys() & second.keys())
    a = np.array([first[feature].score for feature in common], dtype=np.int64)
    b = np.array([second[feature].score for feature in common], dtype=np.int64)
    counts = np.zeros((len(SCORES), len(SCORES)), dtype=np.int64)
    np.add.at(counts, (a - 1, b - 1), 1)
    if not common:
        return Agreement(0, None, None, None, None, None, None, None, counts.tolist())
    return Agreement(
        n=len(common),
        exact=float((a == b).mean()),
        within_one=float((abs(a - b) <= 1).mean()),
        same_category=float(np.mean([first[f].category == second[f].category for f in common])),
        pearson=_pearson(a, b),
        spearman=_pearson(rankdata(a), rankdata(b)),
        kappa=_linear_kappa(counts),
        mean_difference=float((b - a).mean()),
        counts=counts.tolist(),
    )


def _pearson(a: np.ndarray, b: np.ndarray) -> float | None:
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    a, b = a - a.mean(), b - b.mean()
    return float((a @ b) / np.sqrt((a @ a) * (b @ b)))


def _linear_kappa(counts: Int[np.ndarray, "k k"]) -> float | None:
    n = counts.sum()
    score = np.arange(len(counts))
    difference = abs(score[:, None] - score[None, :])
    observed = (difference * counts).sum() / n
    expected = (difference * np.outer(counts.sum(1), counts.sum(0))).sum() / n**2
    return None if expected == 0 else float(1 - observed / expected)
