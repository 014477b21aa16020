"""Annotations of characters as labels of a model's tokens.

1. Each document is tokenized by itself and cut into contexts, as the SAE's metadata says.
2. A span's labels stand at the token that holds its last character: the first position at which
   the model has read all of it. Its earlier tokens do not count, neither as positive nor negative.
3. Concepts that are too rare or too frequent to be measured are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sae_lens_route.data.annotations import LEVELS, AnnotatedDocument, Concept
from sae_lens_route.data.kept_tokens import KeptTokens
from sae_lens_route.errors import UserError


class ConceptTokens(NamedTuple):
    """Contexts of tokens with the concepts that end at each token."""

    tokens: Int[Tensor, "n pos"]
    """Token ids; contexts of one document each, padded on the right."""
    labels: Bool[Tensor, "n pos C"]
    """Whether a token carries a concept."""
    annotated: Bool[Tensor, "n pos"]
    """Tokens that count: kept, not special, and the last token of an annotated span."""
    is_test: Bool[Tensor, " n"]
    """Half of the split, by document: True test, False dev."""
    documents: Int[Tensor, " n"]
    """Index of each context's document."""
    concepts: tuple[Concept, ...]
    """The last axis of `labels`: levels in the order of `LEVELS`, others last as they appear, in
    each the most frequent first."""


def concept_tokens(
    documents: Sequence[AnnotatedDocument],
    sae: Any,
    tokenizer: Any,
    *,
    is_test: Sequence[bool] | None = None,
    min_positives: int = 10,
    max_concepts_per_level: int = 128,
) -> ConceptTokens:
    """Tokens and labels of annotated documents, in contexts as the SAE was trained on.

    A long document continues in further contexts. A span that the edge of a context divides is
    left out, because no position has read all of it. A token at which several spans end carries
    the concepts of all of them.

    Args:
        documents: What to tokenize.
        sae: Any SAE with its metadata: `context_size`, `prepend_bos`, and which tokens are kept.
        tokenizer: The model's, a fast one, which says where in the text each token lies.
        is_test: Half of each document. By default the longest documents alternate and the shorter
            ones fill up, so that both halves have the same amount of text, the same in every run.
        min_positives: Annotated tokens that a concept needs in each half. A concept of more than
            half of all annotated tokens is left out as well.
        max_concepts_per_level: The most frequent ones are kept.

    Raises:
        UserError: the tokenizer gives no offsets, the metadata no context size, `is_test` has
            another length, or no concept is left.
    """
    halves = np.array(_halves(documents) if is_test is None else is_test, dtype=bool)
    if len(halves) != len(documents):
        raise UserError(
            f"is_test has {len(halves)} values for {len(documents)} documents: give one for each"
        )
    text = _tokenized(documents, tokenizer)
    contexts = _contexts(text, sae, tokenizer)
    tokens, carried = _ends_of_spans(documents, text, contexts)
    concepts = tuple(dict.fromkeys(concept for span in carried for concept in span))
    index = {concept: i for i, concept in enumerate(concepts)}
    pairs = {(t, index[c]) for t, span in zip(tokens, carried, strict=True) for c in span}
    token, concept = np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2).T

    in_test = halves[text.document[token]]
    dev, test = (np.bincount(concept[x], minlength=len(concepts)) for x in (~in_test, in_test))
    n_annotated = len(set(tokens))
    suitable = (np.minimum(dev, test) >= min_positives) & (dev + test <= n_annotated // 2)
    chosen = _most_frequent(concepts, np.where(suitable, dev + test, 0), max_concepts_per_level)
    if not chosen:
        raise UserError(
            f"none of {len(concepts)} concepts has min_positives={min_positives} tokens in each "
            f"half and at most half of the {n_annotated} annotated tokens: lower min_positives or "
            "give more documents"
        )
    column = np.full(len(concepts), -1)
    column[chosen] = range(len(chosen))
    kept = column[concept] >= 0
    labels = torch.zeros(contexts.tokens.numel(), len(chosen), dtype=torch.bool)
    labels[contexts.place[token[kept]], column[concept[kept]]] = True
    annotated = torch.zeros(contexts.tokens.numel(), dtype=torch.bool)
    annotated[contexts.place[tokens]] = True
    shape = contexts.tokens.shape
    return ConceptTokens(
        tokens=contexts.tokens,
        labels=labels.view(*shape, -1),
        annotated=annotated.view(shape),
        is_test=torch.from_numpy(halves)[contexts.documents],
        documents=contexts.documents,
        concepts=tuple(concepts[i] for i in chosen),
    )


def _halves(documents: Sequence[AnnotatedDocument]) -> list[bool]:
    """From the longest document to the shortest, each goes to the half that has less text."""
    sizes = [len(document.text) for document in documents]
    in_test, characters = [False] * len(documents), [0, 0]
    for i in sorted(range(len(documents)), key=lambda i: (-sizes[i], documents[i].name)):
        in_test[i] = characters[True] < characters[False]
        characters[in_test[i]] += sizes[i]
    return in_test


class _Text(NamedTuple):
    """The tokens of all documents in a row; characters are counted through all documents."""

    ids: Int[np.ndarray, " T"]
    document: Int[np.ndarray, " T"]
    start: Int[np.ndarray, " T"]
    """First character of each token. The pieces of a divided character all have its offsets."""
    end: Int[np.ndarray, " T"]
    base: list[int]
    """First character of each document."""


def _tokenized(documents: Sequence[AnnotatedDocument], tokenizer: Any) -> _Text:
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"the tokenizer {type(tokenizer).__name__} does not say where its tokens lie in the "
            "text: load a fast one (AutoTokenizer, use_fast=True)"
        )
    texts = [document.text for document in documents]
    if not any(text.strip() for text in texts):
        raise UserError(f"{len(texts)} documents without text: there is nothing to tokenize")
    encoded = tokenizer(
        texts, add_special_tokens=False, return_offsets_mapping=True, truncation=False,
        padding=False, verbose=False,
    )  # fmt: skip
    base = np.cumsum([0, *map(len, texts[:-1])])
    document = np.repeat(np.arange(len(texts)), [len(ids) for ids in encoded["input_ids"]])
    offsets = [np.array(pairs).reshape(-1, 2) for pairs in encoded["offset_mapping"]]
    start, end = (np.concatenate(offsets) + base[document, None]).T
    ids = np.concatenate([np.array(ids, dtype=np.int64) for ids in encoded["input_ids"]])
    return _Text(ids, document, start, end, base.tolist())


class _Contexts(NamedTuple):
    tokens: Int[Tensor, "n pos"]
    documents: Int[Tensor, " n"]
    place: Int[np.ndarray, " T"]
    """Where each token of the text stands, in the flattened contexts."""
    counts: Bool[np.ndarray, " T"]
    """Which tokens of the text are kept and not special."""


def _contexts(text: _Text, sae: Any, tokenizer: Any) -> _Contexts:
    metadata = sae.cfg.metadata
    bos = tokenizer.bos_token_id if metadata.prepend_bos else None  # as SAELens: none, no BOS
    n_bos = int(bos is not None)
    size = (metadata.context_size or 0) - n_bos
    if size < 1:
        raise UserError(
            f"metadata.context_size={metadata.context_size}: set the size of the contexts that the "
            "SAE was trained on"
        )
    n_tokens = np.bincount(text.document, minlength=len(text.base))
    n_contexts = -(-n_tokens // size)
    position = np.arange(len(text.ids)) - (np.cumsum(n_tokens) - n_tokens)[text.document]
    row = (np.cumsum(n_contexts) - n_contexts)[text.document] + position // size
    width = min(size, int(n_tokens.max())) + n_bos
    place = row * width + position % size + n_bos
    padding = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    tokens = np.full((n_contexts.sum(), width), padding)
    if bos is not None:
        tokens[:, 0] = bos
    tokens.ravel()[place] = text.ids
    contexts = torch.from_numpy(tokens)
    counts = KeptTokens.of(sae, tokenizer).mask(contexts).numpy().ravel()[place]
    counts &= ~np.isin(text.ids, tokenizer.all_special_ids)
    documents = torch.from_numpy(np.repeat(np.arange(len(n_tokens)), n_contexts))
    return _Contexts(contexts, documents, place, counts)


def _ends_of_spans(
    documents: Sequence[AnnotatedDocument], text: _Text, contexts: _Contexts
) -> tuple[list[int], list[tuple[Concept, ...]]]:
    """The token that ends each span that can be measured, and the concepts the span carries."""
    edges: list[tuple[int, int]] = []
    carried: list[tuple[Concept, ...]] = []
    for document, base in zip(documents, text.base, strict=True):
        for start, end, concepts in document.spans:
            words = document.text[start:end]
            # white space at its edges may belong to the neighbors' tokens
            first, after = end - len(words.lstrip()), start + len(words.rstrip())
            edges.append((base + first, base + after - 1))
            carried.append(concepts)
    first_character, last_character = np.array(edges, dtype=np.int64).reshape(-1, 2).T
    # the last token that starts at or before the last character: of several tokens that divide a
    # character it is the one that completes it
    last = np.searchsorted(text.start, last_character, side="right") - 1
    first = np.searchsorted(text.end, first_character, side="right")
    found = np.flatnonzero((first <= last) & (text.end[last] > last_character))
    row = contexts.place // contexts.tokens.shape[1]
    whole = row[first[found]] == row[last[found]]
    found = found[whole & contexts.counts[last[found]]]
    return last[found].tolist(), [carried[i] for i in found]


def _most_frequent(
    concepts: Sequence[Concept], frequency: Int[np.ndarray, " C"], n_per_level: int
) -> list[int]:
    """Indices of the concepts that occur, level by level, at most `n_per_level` of each."""
    order = sorted(np.flatnonzero(frequency).tolist(), key=lambda i: (-frequency[i], concepts[i]))
    levels = dict.fromkeys(concept.level for concept in concepts)
    known = {level: i for i, level in enumerate(LEVELS)}
    of_level: dict[str, list[int]] = {
        level: [] for level in sorted(levels, key=lambda level: known.get(level, len(known)))
    }
    for i in order:
        of_level[concepts[i].level].append(i)
    return [i for indices in of_level.values() for i in indices[:n_per_level]]
