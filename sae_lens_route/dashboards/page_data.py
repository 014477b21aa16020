"""The numbers of a page of features, ready for JSON.

Blocks are the model's indices; only a text's probabilities are listed by route, in the order of
`PageData.blocks`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
from jaxtyping import Float, Int

from sae_lens_route.dashboards.collect import Collected, RoutedText, collect, route_text
from sae_lens_route.data.reading import Text
from sae_lens_route.features.judge_prompt import Answer
from sae_lens_route.features.selection import features_to_show
from sae_lens_route.features.sentences import CLOSE, OPEN, piece_of
from sae_lens_route.features.surface_score import SurfaceScore
from sae_lens_route.features.table import Context, FeatureTable, require_table_of
from sae_lens_route.models.kinds import LanguageModel, tokenizer_of
from sae_lens_route.saes.metadata import routed_blocks
from sae_lens_route.saes.routed import RoutedSAEMixin
from sae_lens_route.saes.units import Units

N_FEATURES = 32
N_BINS = 40
N_CONTEXTS = 16
CONTEXT_TOKENS = 48
VIOLIN_POINTS = 200

Score = int | float | Answer | SurfaceScore
"""Score of a feature: a number, a judge's answer, or the statistic that needs no judge."""


class PageContext(TypedDict):
    """Tokens around a strong activation; each list has one entry per piece of text."""

    sequence: int
    position: int
    at: int
    """Index of the activated token in the lists."""
    tokens: list[int]
    """Indices into `PageData.words`."""
    acts: list[float | None]
    """None where a feature table has no activation: all but the activated token."""
    blocks: list[int | None]
    """None at excluded tokens, and where a feature table has no block."""
    weights: list[float | None]


class PageText(TypedDict):
    """Routing of a text."""

    tokens: list[int]
    """Indices into `PageData.words`."""
    probs: list[list[float]]
    """Per token, the probability of each route."""
    blocks: list[int]
    """The chosen block of each token."""


class PageFeature(TypedDict):
    """The numbers of one feature."""

    feature: int
    n_fired: int
    density: float
    max_activation: float
    mean_block: float | None
    """None if the feature never fires."""
    histogram: list[int]
    """Tokens per bin of activation; `N_BINS` bins from 0 to `max_activation`."""
    n_fired_by_block: dict[int, int]
    activations_by_block: dict[int, list[float]]
    """Ascending, at most `VIOLIN_POINTS` of them."""
    contexts: list[PageContext]
    score: float | None
    category: str | None
    explanation: str | None


class PageData(TypedDict):
    """The numbers of a page, as they are embedded in it."""

    model: str
    architecture: str
    routing: str
    units: Units
    """Of the activations."""
    d_sae: int
    blocks: list[int]
    """The block of each route."""
    n_tokens: int
    """Kept tokens."""
    n_sequences: int
    share_by_block: dict[int, float]
    mean_probs_by_block: dict[int, float]
    score_name: str
    features: list[PageFeature]
    texts: list[PageText]
    words: list[str]
    """The pieces of text on the page, each once."""


def page_data(
    model: LanguageModel,
    sae: RoutedSAEMixin,
    text: Text,
    *,
    features: Sequence[int] | None = None,
    n_features: int = N_FEATURES,
    judge_scores: Mapping[int, Score] | None = None,
    feature_table: FeatureTable | None = None,
    texts: Sequence[str] | None = None,
    max_tokens: int = 50_000,
    units: Units = "n(x)",
) -> PageData:
    """The numbers of `write_dashboard`'s page (same arguments)."""
    blocks = routed_blocks(sae)
    if feature_table is not None:
        require_table_of(sae, feature_table, units)
        features = features_to_show(feature_table, n_features) if features is None else features
    collected = collect(model, sae, text, features=features, max_tokens=max_tokens, units=units)
    if features is None:
        features = collected.features_to_show(n_features)
    scores = judge_scores or {}
    summary = _Summary(collected, blocks, tokenizer_of(model), feature_table)
    entries = [summary.feature(f, scores.get(f)) for f in dict.fromkeys(features)]
    shown = collected.first_texts if texts is None else [route_text(model, sae, t) for t in texts]
    n_kept = int(collected.tokens.kept.sum())
    routes = collected.tokens.route[collected.tokens.kept]
    share = np.bincount(routes, minlength=len(blocks)) / n_kept
    surface = any(isinstance(score, SurfaceScore) for score in scores.values())
    return {
        "model": sae.cfg.metadata.model_name or "",
        "architecture": sae.cfg.architecture(),
        "routing": sae.cfg.routing,
        "units": units,
        "d_sae": sae.cfg.d_sae,
        "blocks": blocks,
        "n_tokens": n_kept,
        "n_sequences": int(collected.tokens.sequence[-1]) + 1,
        "share_by_block": dict(zip(blocks, map(_short, share), strict=True)),
        "mean_probs_by_block": dict(zip(blocks, map(_short, collected.mean_probs), strict=True)),
        "score_name": "surface score" if surface else "judge score",
        "features": entries,
        "texts": [summary.text(routed) for routed in shown],
        # last, because features and texts add to it
        "words": summary.words.pieces,
    }


class _Words:
    """The pieces of text on a page, each written once; the rest of the page has their indices."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._index: dict[int | str, int] = {}
        self.pieces: list[str] = []

    def index(self, of: int | str) -> int:
        """Index of a token, by its id, or of a piece of text."""
        if of not in self._index:
            raw = of if isinstance(of, str) else self._tokenizer.convert_ids_to_tokens(of) or ""
            self._index[of] = len(self.pieces)
            self.pieces.append(raw if isinstance(of, str) else piece_of(self._tokenizer, raw))
        return self._index[of]


class _Summary:
    """Turns collected activations into the entries of a page."""

    def __init__(
        self, collected: Collected, blocks: list[int], tokenizer: Any, table: FeatureTable | None
    ) -> None:
        self.collected, self.table = collected, table
        self.words = _Words(tokenizer)
        self.blocks = np.array(blocks)
        self.token_blocks = self.blocks[collected.tokens.route]
        self.n_kept = int(collected.tokens.kept.sum())

    def feature(self, feature: int, score: Score | None) -> PageFeature:
        token, value = self.collected.activations(feature)
        block = self.token_blocks[token]
        by_block = {b: value[block == b] for b in self.blocks.tolist()}
        maximum = float(value.max(initial=0.0))
        answer = score if isinstance(score, Answer) else None
        return {
            "feature": feature,
            "n_fired": len(token),
            "density": _short(len(token) / self.n_kept),
            "max_activation": maximum,
            "mean_block": _short(float(block.mean())) if len(token) else None,
            "histogram": np.histogram(value, N_BINS, range=(0.0, maximum or 1.0))[0].tolist(),
            "n_fired_by_block": {b: len(values) for b, values in by_block.items()},
            "activations_by_block": {b: _order_statistics(v) for b, v in by_block.items()},
            "contexts": self._contexts(feature),
            "score": _number(score),
            "category": None if answer is None else answer.category,
            "explanation": None if answer is None else answer.explanation,
        }

    def text(self, routed: RoutedText) -> PageText:
        return {
            "tokens": [self.words.index(token) for token in routed.ids.tolist()],
            "probs": [[round(p, 4) for p in row] for row in routed.probs.tolist()],
            "blocks": self.blocks[routed.route].tolist(),
        }

    def _contexts(self, feature: int) -> list[PageContext]:
        if self.table is not None and (contexts := self.table.contexts_of(feature)):
            return [self._of_table(context) for context in contexts[:N_CONTEXTS]]
        token, value = self.collected.activations(feature)
        return [self._around(at, token, value) for at in self._strongest(token, value)]

    def _of_table(self, context: Context) -> PageContext:
        before, _, rest = context.text.partition(OPEN)
        activated, _, after = rest.partition(CLOSE)
        left, right = [None] * bool(before), [None] * bool(after)
        pieces = [piece for piece in (before, activated, after) if piece]
        return {
            "sequence": context.sequence,
            "position": context.position,
            "at": len(left),
            "tokens": [self.words.index(piece) for piece in pieces],
            "acts": [*left, _short(context.activation), *right],
            "blocks": [*left, context.block, *right],
            "weights": [*left, round(context.weight, 3), *right],
        }

    def _strongest(self, token: Int[np.ndarray, " n"], value: Float[np.ndarray, " n"]) -> list[int]:
        """Tokens with the strongest activations, no two of them within half a window."""
        sequence = self.collected.tokens.sequence
        chosen: list[int] = []
        for i in np.argsort(-value, kind="stable").tolist():
            at = int(token[i])
            near = (other for other in chosen if abs(at - other) < CONTEXT_TOKENS // 2)
            if all(sequence[other] != sequence[at] for other in near):
                chosen.append(at)
            if len(chosen) == N_CONTEXTS:
                break
        return chosen

    def _around(
        self, at: int, token: Int[np.ndarray, " n"], value: Float[np.ndarray, " n"]
    ) -> PageContext:
        """The window of tokens around an activated one, within its sequence."""
        tokens, half = self.collected.tokens, CONTEXT_TOKENS // 2
        first = at - min(half, int(tokens.position[at]))
        end = first + int((tokens.sequence[first : at + half] == tokens.sequence[at]).sum())
        window = slice(first, end)
        acts = np.zeros(end - first)
        inside = (token >= first) & (token < end)
        acts[token[inside] - first] = value[inside]
        blocks = zip(self.token_blocks[window].tolist(), tokens.kept[window], strict=True)
        return {
            "sequence": int(tokens.sequence[at]),
            "position": int(tokens.position[at]),
            "at": at - first,
            "tokens": [self.words.index(token) for token in tokens.id[window].tolist()],
            "acts": [_short(act) for act in acts.tolist()],
            "blocks": [block if kept else None for block, kept in blocks],
            "weights": [round(weight, 3) for weight in tokens.weight[window].tolist()],
        }


def _short(value: float) -> float:
    """Six significant digits, so that a page stays small."""
    return float(f"{value:.6g}")


def _number(score: Score | None) -> float | None:
    number = score.score if isinstance(score, Answer | SurfaceScore) else score
    return None if number is None else _short(float(number))


def _order_statistics(values: Float[np.ndarray, " n"]) -> list[float]:
    """The values in order, or evenly spaced ones of them from the minimum to the maximum."""
    ordered = np.sort(values)
    if len(ordered) > VIOLIN_POINTS:
        ordered = ordered[np.linspace(0, len(ordered) - 1, VIOLIN_POINTS).round().astype(int)]
    return [_short(value) for value in ordered.tolist()]
