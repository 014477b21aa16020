"""The results of a judge: a file with one JSON line per reply, and its summary (paper 3.4).

Each line is on the disk before the next result is counted. A run that was interrupted, even in the
middle of a line, resumes with the features that have no whole line. Malformed replies are kept as
they came.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from sae_lens_route.errors import UserError
from sae_lens_route.features.judge_prompt import CATEGORIES, SCORES, Answer, Category
from sae_lens_route.features.table import FeatureTable
from sae_lens_route.files import lock


class JudgeResult(NamedTuple):
    """The reply for one feature; one line of the results file."""

    feature: int
    status: Literal["valid", "malformed"]
    category: Category | None
    """None if malformed, like score and explanation."""
    score: int | None
    explanation: str | None
    reply: str
    """The model's text, unchanged."""
    model: str
    request_sha256: str
    """Of model, prompt and request settings, which a resumed run must share."""
    attempts: int
    """Requests sent, including retries."""
    prompt_tokens: int | None
    """As the endpoint counts them; None if it does not."""
    completion_tokens: int | None

    @property
    def answer(self) -> Answer | None:
        """The valid answer, or None."""
        if self.category is None or self.score is None or self.explanation is None:
            return None
        return Answer(self.category, self.score, self.explanation)


def read_results(path: str | Path) -> dict[int, JudgeResult]:
    """Results by feature, in the order of the file, without an incomplete last line.

    Raises:
        UserError: a complete line is not a result, or a feature has two.
    """
    return _parse_results(Path(path), Path(path).read_bytes())[0]


def _parse_results(path: Path, content: bytes) -> tuple[dict[int, JudgeResult], int]:
    """Results of the complete lines, and the number of bytes of those lines."""
    n_whole = content.rfind(b"\n") + 1
    results: dict[int, JudgeResult] = {}
    for number, line in enumerate(content[:n_whole].splitlines(), start=1):
        try:
            result = JudgeResult(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise UserError(f"{str(path)!r}, line {number}: not a judge's result") from error
        if result.feature in results:
            raise UserError(f"{str(path)!r}, line {number}: duplicate feature {result.feature}")
        results[result.feature] = result
    return results, n_whole


class ResultsFile:
    """A results file open for appending, locked against other processes.

    Raises:
        UserError: as `read_results`, or another process writes to the file.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            lock(self._file, repr(str(path)))
            self._file.seek(0)
            self.results, n_whole = _parse_results(path, self._file.read())
            self._file.truncate(n_whole)
        except BaseException:
            self._file.close()
            raise

    def append(self, result: JudgeResult) -> None:
        """Write a result to the disk before returning."""
        # ASCII, because a reply may hold half of a surrogate pair
        self._file.write(json.dumps(result._asdict()).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.results[result.feature] = result

    def __enter__(self) -> ResultsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class JudgeSummary(NamedTuple):
    """Scores of a sample of features; means and shares are over the valid answers."""

    n_features: int
    """Features in the sample: valid, malformed and failed."""
    n_valid: int
    n_malformed: int
    """Replies in another format than the prompt asks for."""
    n_failed: int
    """Features without a reply; a resumed run asks for them again."""
    mean_score: float | None
    """None when no answer is valid."""
    score_counts: dict[int, int]
    category_shares: dict[Category, float] | None
    mean_score_by_depth: dict[str, float | None]
    """Of the features whose profile is "shallow", and of those whose profile is "deep"."""
    mean_score_by_block: dict[int, float | None]
    """Each feature is weighted by the share of its activations at the block."""


def answers(results: Mapping[int, JudgeResult]) -> dict[int, Answer]:
    """The valid answers among results, by feature."""
    by_feature = {feature: result.answer for feature, result in results.items()}
    return {feature: answer for feature, answer in by_feature.items() if answer is not None}


def summarize(
    table: FeatureTable, sample: Sequence[int], results: Mapping[int, JudgeResult]
) -> JudgeSummary:
    """Means, shares and counts over the features of a sample."""
    asked = {feature: results[feature] for feature in sample if feature in results}
    valid = answers(asked)
    scores = {feature: float(answer.score) for feature, answer in valid.items()}
    profiles = {feature: table.profile(feature) for feature in valid}
    shares = [profiles[feature].share_by_block or {} for feature in scores]
    categories = Counter(answer.category for answer in valid.values())
    return JudgeSummary(
        n_features=len(sample),
        n_valid=len(valid),
        n_malformed=len(asked) - len(valid),
        n_failed=len(sample) - len(asked),
        mean_score=_mean(scores.values()),
        score_counts={s: list(scores.values()).count(s) for s in SCORES},
        category_shares={c: categories[c] / len(valid) for c in CATEGORIES} if valid else None,
        mean_score_by_depth={
            depth: _mean(s for f, s in scores.items() if profiles[f].depth == depth)
            for depth in ("shallow", "deep")
        },
        mean_score_by_block={
            block: _mean(scores.values(), [share.get(block, 0.0) for share in shares])
            for block in table.run.routed_blocks
        },
    )


def _mean(values: Iterable[float], weights: Sequence[float] | None = None) -> float | None:
    """The weighted mean, or None if there is nothing to average."""
    values = list(values)
    weights = [1.0] * len(values) if weights is None else weights
    total = sum(weights)
    return sum(v * w for v, w in zip(values, weights, strict=True)) / total if total else None
