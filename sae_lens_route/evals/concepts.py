"""Which annotated concepts single features of dictionaries recover, by level.

One forward pass reads the text for all dictionaries. For each concept a feature and its threshold
are chosen on the dev half and scored on the test half (`concept_scores.py`). Every mean over
concepts counts each concept once, whatever its frequency.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from tqdm.auto import tqdm

from sae_lens_route.data.annotations import Concept
from sae_lens_route.data.concept_tokens import ConceptTokens
from sae_lens_route.data.reading import activation_batches
from sae_lens_route.errors import UserError
from sae_lens_route.evals.concept_probes import probe_f1
from sae_lens_route.evals.concept_readers import FeatureReader
from sae_lens_route.evals.concept_scores import (
    BestFeatures,
    Counts,
    bootstrap,
    choose,
    classified,
    f1_scores,
    still_precise,
)
from sae_lens_route.evals.concept_tables import FeatureTable
from sae_lens_route.evals.reconstruction import DENSE_SHARE
from sae_lens_route.models.kinds import LanguageModel
from sae_lens_route.records import plain, typed
from sae_lens_route.saes.routed import uniform_from_the_seed


class ConceptScore(NamedTuple):
    """How well one feature recovers a concept. Rates are of the test half unless they say dev."""

    name: str
    level: str
    n_dev: int
    """Tokens of the dev half that carry the concept."""
    n_test: int
    feature: int | None
    """The feature that was chosen; null if none is active where the concept is."""
    sign: int
    """-1 if the negation of a dimension was chosen, as only dense baselines have."""
    threshold: float
    """The feature is active where sign * activation is above."""
    f1_dev: float
    f1: float
    precision: float | None
    """Null where the feature is never active."""
    recall: float
    f1_shuffled: float
    """The same of labels permuted over the tokens of each half: the chance level."""
    probe_f1: dict[int, float]
    """F1 of a logistic regression on so many features."""
    share_by_block: dict[int, float]
    """Where the feature lives: blocks that its activations above the threshold were read from, in
    both halves; of a crosscoder, norms of the decoder."""
    mean_block: float | None
    """Mean of these blocks."""


class LevelScore(NamedTuple):
    """Means over the concepts of a level, or over all concepts."""

    n_concepts: int
    f1: float
    """The coverage."""
    f1_interval: tuple[float, float]
    """95 % of bootstrap samples of the test documents; the features stay the same."""
    f1_shuffled: float
    """Chance level of `f1`."""
    probe_f1: dict[int, float]
    """By number of features."""
    precise_features: int
    """Features that find at least 10 positives of some concept with a precision of at least .95, in
    both halves, with the concept and threshold chosen on the dev half."""


class DictionaryScores(NamedTuple):
    """Which concepts the features of one dictionary recover."""

    n_features: int
    dead_features: int
    """Features that no annotated token activates."""
    dense_features: int
    """Features that more than 10 % of the annotated tokens activate."""
    overall: LevelScore
    """All concepts, each counted once."""
    levels: dict[str, LevelScore]
    concepts: list[ConceptScore]


class ConceptRecovery(NamedTuple):
    """Scores of several dictionaries on the same annotated tokens."""

    n_dev_tokens: int
    n_test_tokens: int
    n_test_documents: int
    dictionaries: dict[str, DictionaryScores]

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries, for JSON."""
        return plain(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ConceptRecovery:
        """The result that `to_dict` or its JSON describes."""
        return typed(cls, values)


class AnnotatedTokens(NamedTuple):
    """The annotated tokens of both halves, dev first."""

    labels: Bool[np.ndarray, "tokens C"]
    """Which concepts each token carries."""
    documents: Int[np.ndarray, " tokens"]
    """Document of each token, from 0 among those of its half."""
    n_dev: int
    concepts: tuple[Concept, ...]

    @property
    def dev(self) -> slice:
        return slice(0, self.n_dev)

    @property
    def test(self) -> slice:
        return slice(self.n_dev, len(self.labels))

    def shuffled(self, seed: int) -> AnnotatedTokens:
        """With labels permuted over the tokens of each half."""
        generator = np.random.default_rng(seed)
        n_test = len(self.labels) - self.n_dev
        order = [generator.permutation(self.n_dev), self.n_dev + generator.permutation(n_test)]
        return self._replace(labels=self.labels[np.concatenate(order)])


@torch.no_grad()
def recover_concepts(
    model: LanguageModel,
    readers: Sequence[FeatureReader],
    concept_tokens: ConceptTokens,
    *,
    batch_size: int = 8,
    probe_sizes: Sequence[int] = (),
    seed: int = 0,
) -> ConceptRecovery:
    """Score how well the features of dictionaries recover annotated concepts.

    Args:
        model: The model that the readers' SAEs were trained on.
        readers: Dictionaries (`concept_readers.reader_of`) and baselines (`concept_baselines`). All
            their SAEs must read text in the same way.
        concept_tokens: The text and its labels.
        batch_size: Contexts in one forward pass.
        probe_sizes: Numbers of features to fit probes to, such as (1, 5); needs scikit-learn.
        seed: Of the permuted labels and the bootstrap samples.

    Raises:
        UserError: Two readers share a name, or a half lacks tokens of a concept.
    """
    names = [reader.name for reader in readers]
    if not names or len(set(names)) < len(names):
        raise UserError(f"readers={names}: at least one is needed, each with its own name")
    tokens, parts = _read(model, readers, concept_tokens, batch_size)
    shuffled = tokens.shuffled(seed)
    dictionaries = {}
    for reader in tqdm(readers, "scoring concepts", unit="dictionary"):
        table = reader.table(parts.pop(reader.name), tokens.n_dev)
        dictionaries[reader.name] = _scores(table, tokens, shuffled, probe_sizes, seed)
    n_documents = int(tokens.documents[tokens.test].max()) + 1
    n_tokens = len(tokens.labels)
    return ConceptRecovery(tokens.n_dev, n_tokens - tokens.n_dev, n_documents, dictionaries)


def _read(
    model: LanguageModel,
    readers: Sequence[FeatureReader],
    concept_tokens: ConceptTokens,
    batch_size: int,
) -> tuple[AnnotatedTokens, dict[str, list[Any]]]:
    """What each reader reads at the annotated tokens of each batch, dev half first."""
    order = concept_tokens.is_test.to(torch.uint8).argsort(stable=True)
    text, annotated, labels, is_test, documents = (
        part[order]
        for part in (
            concept_tokens.tokens,
            concept_tokens.annotated,
            concept_tokens.labels,
            concept_tokens.is_test,
            concept_tokens.documents,
        )
    )
    saes = list({id(sae): sae for reader in readers for sae in reader.saes}.values())
    parts: dict[str, list[Any]] = {reader.name: [] for reader in readers}
    counted: list[torch.Tensor] = []
    start = 0
    with ExitStack() as draws:
        for sae in saes:
            draws.enter_context(uniform_from_the_seed(sae))
        for batch in activation_batches(
            model, saes, text, batch_size=batch_size, description="reading annotated text"
        ):
            stop = start + len(batch.tokens)
            kept = batch.kept & annotated[start:stop].to(batch.kept.device)
            for reader in readers:
                parts[reader.name].append(reader.read(batch._replace(kept=kept)))
            counted.append(kept.cpu())
            start = stop
    is_counted = torch.cat(counted)
    return _annotated_tokens(is_counted, labels, is_test, documents, concept_tokens.concepts), parts


def _annotated_tokens(
    is_counted: torch.Tensor,
    labels: torch.Tensor,
    is_test: torch.Tensor,
    documents: torch.Tensor,
    concepts: tuple[Concept, ...],
) -> AnnotatedTokens:
    def of_tokens(per_context: torch.Tensor) -> np.ndarray:
        return per_context.cpu().unsqueeze(1).expand_as(is_counted)[is_counted].numpy()

    in_test = of_tokens(is_test)
    n_dev = int((~in_test).sum())
    document = of_tokens(documents)
    document = np.concatenate(
        [np.unique(half, return_inverse=True)[1] for half in (document[:n_dev], document[n_dev:])]
    )
    carries = labels.cpu()[is_counted].numpy()
    for half, rows in (("dev", carries[:n_dev]), ("test", carries[n_dev:])):
        if missing := [concepts[i].name for i in np.flatnonzero(~rows.any(0))]:
            raise UserError(
                f"no token of the {half} half carries {', '.join(missing)}; keep concepts that "
                "occur in both halves"
            )
    return AnnotatedTokens(carries, document, n_dev, concepts)


def _scores(
    table: FeatureTable,
    tokens: AnnotatedTokens,
    shuffled: AnnotatedTokens,
    probe_sizes: Sequence[int],
    seed: int,
) -> DictionaryScores:
    dev, test = table.rows(tokens.dev), table.rows(tokens.test)
    best, precise = choose(dev, tokens.labels[tokens.dev])
    precise_concepts = precise.concept[still_precise(test, precise, tokens.labels[tokens.test])]
    by_document = _classified(test, best, tokens)
    by_chance, _ = choose(dev, shuffled.labels[shuffled.dev])
    chance = f1_scores(_classified(test, by_chance, shuffled).of_all_documents())[0]
    probes: list[dict[int, float]] = [{} for _ in tokens.concepts]
    if probe_sizes:
        halves = tokens.labels[tokens.dev], tokens.labels[tokens.test]
        probes = probe_f1(dev, test, *halves, probe_sizes)
    n_dev = tokens.labels[tokens.dev].sum(0)
    concepts = [
        _concept_score(concept, i, table, best, by_document, int(n_dev[i]), chance[i], probes[i])
        for i, concept in enumerate(tokens.concepts)
    ]
    samples = bootstrap(by_document, seed=seed)

    def level_score(indices: Iterable[int]) -> LevelScore:
        at = np.fromiter(indices, dtype=np.int64)
        return _level_score([concepts[i] for i in at], samples[:, at], precise_concepts, at)

    levels = list(dict.fromkeys(concept.level for concept in tokens.concepts))
    of_level = {
        level: [i for i, concept in enumerate(tokens.concepts) if concept.level == level]
        for level in levels
    }
    n_active = table.n_active()
    return DictionaryScores(
        n_features=table.n_features,
        dead_features=int((n_active == 0).sum()),
        dense_features=int((n_active > DENSE_SHARE * len(tokens.labels)).sum()),
        overall=level_score(range(len(concepts))),
        levels={level: level_score(indices) for level, indices in of_level.items()},
        concepts=concepts,
    )


def _classified(test: FeatureTable, best: BestFeatures, tokens: AnnotatedTokens) -> Counts:
    return classified(test, best, tokens.labels[tokens.test], tokens.documents[tokens.test])


def _concept_score(
    concept: Concept,
    index: int,
    table: FeatureTable,
    best: BestFeatures,
    by_document: Counts,
    n_dev: int,
    chance: float,
    probes: dict[int, float],
) -> ConceptScore:
    found, wrong, missed = (int(part[:, index].sum()) for part in by_document)
    feature, threshold = int(best.feature[index]), float(best.threshold[index])
    column, sign = table.column(feature) if feature >= 0 else (None, 1)
    shares = table.share_by_block(feature, threshold) if feature >= 0 else {}
    return ConceptScore(
        name=concept.name,
        level=concept.level,
        n_dev=n_dev,
        n_test=found + missed,
        feature=column,
        sign=sign,
        threshold=threshold,
        f1_dev=float(best.f1[index]),
        f1=2 * found / (2 * found + wrong + missed),
        precision=found / (found + wrong) if found + wrong else None,
        recall=found / (found + missed),
        f1_shuffled=float(chance),
        probe_f1=probes,
        share_by_block=shares,
        mean_block=sum(block * share for block, share in shares.items()) if shares else None,
    )


def _level_score(
    concepts: Sequence[ConceptScore],
    samples: Float[np.ndarray, "n_samples n"],
    precise_concepts: Int[np.ndarray, " n_precise"],
    indices: Int[np.ndarray, " n"],
) -> LevelScore:
    # a sample without any token of a concept is a mean over the others
    n_known = (~np.isnan(samples)).sum(1)
    means = np.nansum(samples, axis=1)[n_known > 0] / n_known[n_known > 0]
    low, high = np.percentile(means, [2.5, 97.5]).tolist()
    return LevelScore(
        n_concepts=len(concepts),
        f1=float(np.mean([concept.f1 for concept in concepts])),
        f1_interval=(low, high),
        f1_shuffled=float(np.mean([concept.f1_shuffled for concept in concepts])),
        probe_f1={
            k: float(np.mean([concept.probe_f1[k] for concept in concepts]))
            for k in concepts[0].probe_f1
        },
        precise_features=int(np.isin(precise_concepts, indices).sum()),
    )
