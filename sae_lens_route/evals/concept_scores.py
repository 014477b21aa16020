"""The single feature that recovers a concept best, chosen on one half of the text, scored on the
other.

1. *Choose.* For each concept, every feature with every threshold is a classifier of tokens. F1 can
   only rise where a positive enters, so it is enough to look at the cuts at the positives: one pair
   of an activation and a concept for every label of every active token.
2. *Score.* The feature and threshold with the largest F1 on the dev half classify the test half.

The mean F1 over concepts is the coverage of Karvonen et al. (2024, "Measuring Progress in
Dictionary Learning for Language Model Interpretability with Board Game Models"), on held-out
documents.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Real
from scipy.sparse import csr_array

from sae_lens_route.evals.concept_tables import Cuts, FeatureTable, sorted_cuts

PRECISION = 0.95
"""The precision from which on a feature counts as precise."""

MIN_TRUE_POSITIVES = 10
"""Positives that a precise feature has to find, in each half."""


class BestFeatures(NamedTuple):
    """For each concept, the feature and threshold with the largest F1.

    Of equal F1, the lowest feature and then the highest threshold.
    """

    feature: Int[np.ndarray, " C"]
    """-1 where no feature is active at a positive."""
    threshold: Float[np.ndarray, " C"]
    """The feature is active where its activation is above."""
    f1: Float[np.ndarray, " C"]


class PreciseFeatures(NamedTuple):
    """Features with a concept and a threshold at which they are precise.

    Of several, the one that finds most positives; of these, the most precise.
    """

    feature: Int[np.ndarray, " n"]
    concept: Int[np.ndarray, " n"]
    threshold: Float[np.ndarray, " n"]


class Counts(NamedTuple):
    """How tokens are classified, by document (or sample of documents) and concept."""

    true_positives: Real[np.ndarray, "D C"]
    false_positives: Real[np.ndarray, "D C"]
    false_negatives: Real[np.ndarray, "D C"]

    def of_all_documents(self) -> Counts:
        """The sums over documents, with D = 1."""
        return Counts(*(counts.sum(0, keepdims=True) for counts in self))


def choose(
    table: FeatureTable, labels: Bool[np.ndarray, "tokens C"]
) -> tuple[BestFeatures, PreciseFeatures]:
    """The best feature and threshold for each concept, and the precise features.

    Args:
        table: Activations of the tokens to choose on.
        labels: `[tokens, C]`, which concepts each token carries.
    """
    n_positive, n = labels.sum(0, dtype=np.int32), labels.shape[1]
    concepts_of = csr_array(labels)
    best = BestFeatures(np.full(n, -1), np.zeros(n), np.zeros(n))
    precise = []
    for cuts in table.cuts():
        entry, start, found = _positives(cuts, concepts_of)
        n_active = cuts.n_active[entry]
        half_f1 = found / (n_active + np.repeat(n_positive, np.diff(start)))
        for concept, (a, b) in enumerate(pairwise(start)):
            if a < b and 2 * half_f1[at := a + int(half_f1[a:b].argmax())] > best.f1[concept]:
                best.feature[concept] = cuts.feature[entry[at]]
                best.threshold[concept] = cuts.threshold[entry[at]]
                best.f1[concept] = 2 * half_f1[at]
        precise.append(_precise(cuts, entry, start, found))
    fields = (np.concatenate(parts) for parts in zip(*precise, strict=True))
    return best, PreciseFeatures(*fields)


def _positives(
    cuts: Cuts, concepts_of: csr_array
) -> tuple[Int[np.ndarray, " pairs"], Int[np.ndarray, " C_and_1"], Int[np.ndarray, " pairs"]]:
    """Pairs of a cut and a concept that its token carries, by concept, in the order of the cuts.

    Returns:
        The cut of each pair; where the pairs of each concept start; and how many positives the
        feature finds with this cut. Of equal activations, the last pair has the number.
    """
    # a counting sort by concept that keeps the order of the cuts
    pairs = csr_array(concepts_of[cuts.token]).tocsc()
    entry, start = pairs.indices, pairs.indptr
    feature = cuts.feature[entry]
    is_first = np.append(True, feature[1:] != feature[:-1])[: len(entry)]
    is_first[start[:-1][start[:-1] < len(entry)]] = True
    first = np.flatnonzero(is_first).astype(np.int32)
    runs = np.diff(np.append(first, len(entry)))
    return entry, start, np.arange(1, len(entry) + 1, dtype=np.int32) - np.repeat(first, runs)


def _precise(
    cuts: Cuts,
    entry: Int[np.ndarray, " pairs"],
    start: Int[np.ndarray, " C_and_1"],
    found: Int[np.ndarray, " pairs"],
) -> PreciseFeatures:
    n_active = cuts.n_active[entry]
    at = np.flatnonzero((found >= MIN_TRUE_POSITIVES) & (found / n_active >= PRECISION))
    concept = np.searchsorted(start, at, side="right") - 1
    feature = cuts.feature[entry[at]]
    order = np.lexsort((concept, n_active[at], -found[at], feature))
    feature, first = np.unique(feature[order], return_index=True)
    chosen = order[first]
    return PreciseFeatures(feature, concept[chosen], cuts.threshold[entry[at[chosen]]])


def classified(
    table: FeatureTable,
    best: BestFeatures,
    labels: Bool[np.ndarray, "tokens C"],
    documents: Int[np.ndarray, " tokens"],
) -> Counts:
    """How the chosen features classify tokens.

    Args:
        table: Activations of the tokens to score on.
        best: A feature and a threshold for each concept.
        labels: `[tokens, C]`, which concepts each token carries.
        documents: Document of each token, 0 … D - 1.
    """
    n_documents = int(documents.max()) + 1
    by_concept = np.ascontiguousarray(labels.T)
    chosen = zip(best.feature.tolist(), best.threshold.tolist(), strict=True)
    n_active, found, n_positive = np.zeros((3, n_documents, len(best.feature)), np.int64)
    for concept, (feature, threshold) in enumerate(chosen):
        positives = np.flatnonzero(by_concept[concept])
        active = table.active(feature, threshold) if feature >= 0 else positives[:0]
        hits = active[by_concept[concept, active]]
        for out, tokens in ((n_active, active), (found, hits), (n_positive, positives)):
            out[:, concept] = np.bincount(documents[tokens], minlength=n_documents)
    return Counts(found, n_active - found, n_positive - found)


def still_precise(
    table: FeatureTable, precise: PreciseFeatures, labels: Bool[np.ndarray, "tokens C"]
) -> Bool[np.ndarray, " n"]:
    """Which features are precise on other tokens, too, with the concept and threshold chosen."""
    chosen = zip(*(field.tolist() for field in precise), strict=True)
    hits = (labels[table.active(feature, above), concept] for feature, concept, above in chosen)
    is_precise = [hit.sum() >= MIN_TRUE_POSITIVES and hit.mean() >= PRECISION for hit in hits]
    return np.array(is_precise, dtype=bool)


def f1_scores(counts: Counts) -> Float[np.ndarray, "D C"]:
    """`2 TP / (2 TP + FP + FN)`; NaN where no token carries the concept."""
    found, wrong, missed = counts
    total = 2 * found + wrong + missed
    return np.divide(2 * found, total, out=np.full(total.shape, np.nan), where=found + missed > 0)


def bootstrap(
    counts: Counts, n_samples: int = 1000, seed: int = 0
) -> Float[np.ndarray, "n_samples C"]:
    """F1 of each concept on samples of the documents, drawn with replacement.

    NaN where no token of a sample carries the concept. The same documents are drawn for all
    dictionaries: their samples can be compared one by one.
    """
    n_documents = len(counts.true_positives)
    generator = np.random.default_rng(seed)
    times = generator.multinomial(n_documents, np.full(n_documents, 1 / n_documents), n_samples)
    drawn = times.astype(np.float64)  # for the fast product, exact on counts
    return f1_scores(Counts(*(drawn @ part for part in counts)))


def best_threshold(score: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"]) -> float:
    """The threshold above which scores classify tokens with the largest F1."""
    order = np.argsort(-score)
    floor = float(np.finfo(score.dtype).min)
    cuts = sorted_cuts(order, np.zeros(len(order), np.int64), score[order], floor)
    found = np.cumsum(positive[order])
    return float(cuts.threshold[np.argmax(2 * found / (cuts.n_active + positive.sum()))])
