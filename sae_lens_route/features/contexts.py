"""Contexts of features: the text on which a feature fires, and at which blocks (paper 3.3).

1. Read tokens with their residual streams after the routed blocks; route and encode them.
2. Count on how many tokens each feature is active, by the block they are routed to.
3. Activations above the threshold become candidates, each with its sentence: from after the
   previous sentence end to the next one, at most 64 tokens. The 2 strongest of each feature and
   class of activated token stay (`StrongestContexts`).
4. Features with fewer than 4 contexts are dropped; the contexts of the others are decoded.

Python loops only over the contexts that are decoded. Memory does not grow with the stream.

**Several thresholds** (the paper's Figure 5) cost one pass: the 2 strongest above a higher
threshold are among the 2 strongest above a lower one, and so are the N strongest of a feature.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor

from sae_lens_route.data.reading import ActivationBatch
from sae_lens_route.errors import UserError
from sae_lens_route.features.active import ActiveEntries, active_entries
from sae_lens_route.features.sentences import DecodedSentences, ReferenceSentences, Vocabulary
from sae_lens_route.features.strongest import CANDIDATE, StrongestContexts
from sae_lens_route.features.table import (
    CONTEXT_SCHEMA,
    FEATURE_SCHEMA,
    ContextOptions,
    ContextRun,
    FeatureTable,
    ThresholdCount,
    default_threshold,
)
from sae_lens_route.saes.metadata import routed_blocks, source_hook_names
from sae_lens_route.saes.routed import RoutedSAEMixin
from sae_lens_route.saes.router import Routing
from sae_lens_route.saes.units import in_units

ENCODE_ELEMENTS = 2**26
"""Feature activations encoded at once, so that a large batch and a wide SAE fit in memory."""


def find_contexts(
    sae: RoutedSAEMixin,
    batches: Iterable[ActivationBatch],
    tokenizer: Any,
    options: ContextOptions | None = None,
) -> FeatureTable:
    """Contexts and block profiles of a RouteSAE's features over a stream of any length.

    Args:
        sae: A RouteSAE with its metadata.
        batches: Tokens and residual streams, as `activation_batches` yields them.
        tokenizer: The model's Hugging Face tokenizer.
        options: Thresholds and filters; the paper's by default.

    Raises:
        UserError: the metadata does not name one hook per routed block.
    """
    collector = ContextCollector.of(sae, tokenizer, options)
    with torch.no_grad():
        for batch in batches:
            # routed whole, encoded in parts: uniform routing draws once per batch
            routing = sae.route(batch.of(sae))
            n_rows, n_pos = batch.tokens.shape
            step = max(1, ENCODE_ELEMENTS // (n_pos * sae.cfg.d_sae))
            for first in range(0, n_rows, step):
                rows = slice(first, first + step)
                part = Routing(*(values[rows] for values in routing))
                acts = in_units(sae.encode(part.x_route), part, sae, collector.options.units)
                collector.add(batch.tokens[rows], acts, part.route, part.weight, batch.kept[rows])
    return collector.table()


class ContextCollector:
    """Collects contexts and profiles: `add` batches of feature activations, then read a `table`.

    Args:
        d_in: Width of the SAE's input, for the default threshold.
        d_sae: Number of features.
        routed_blocks: Block of each of the L routes.
        hook_names: Source hook of each route.
        tokenizer: The model's Hugging Face tokenizer.
        options: Thresholds and filters; the paper's by default.
    """

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        routed_blocks: Sequence[int],
        hook_names: Sequence[str],
        tokenizer: Any,
        options: ContextOptions | None = None,
    ) -> None:
        options = options or ContextOptions()
        if options.threshold is None:
            options = replace(options, threshold=default_threshold(d_in))
        self.options = options
        self.d_sae = d_sae
        self.routed_blocks = tuple(routed_blocks)
        self.hook_names = tuple(hook_names)
        self.n_tokens = 0
        self.n_sequences = 0
        self._vocabulary = Vocabulary.of(tokenizer)
        sentences = ReferenceSentences if options.sentences == "raw_tokens" else DecodedSentences
        self._sentences = sentences(tokenizer, self._vocabulary, options.max_length)
        self.strongest = StrongestContexts(
            d_sae, len(self._vocabulary.classes), self._sentences, options
        )
        self._n_fired = np.zeros(d_sae * len(self.hook_names), dtype=np.int64)
        self._max_activation = np.zeros(d_sae, dtype=np.float32)
        self._sum_activation = np.zeros(d_sae)

    @classmethod
    def of(
        cls, sae: SAE[Any], tokenizer: Any, options: ContextOptions | None = None
    ) -> ContextCollector:
        """A collector for the features of a RouteSAE or a crosscoder with its metadata."""
        blocks, hooks = routed_blocks(sae), source_hook_names(sae)
        return cls(sae.cfg.d_in, sae.cfg.d_sae, blocks, hooks, tokenizer, options)

    def add(
        self,
        tokens: Int[Tensor, "batch pos"],
        feature_acts: Float[Tensor, "batch pos d_sae"],
        route: Int[Tensor, "batch pos"],
        weight: Float[Tensor, "batch pos"],
        kept: Bool[Tensor, "batch pos"],
    ) -> None:
        """Read the next sequences of the stream.

        Args:
            tokens: Token ids.
            feature_acts: Activations of those tokens, in the units that the options name.
            route: Route of each token, an index into the routed blocks.
            weight: Route weight of each token.
            kept: False where a token is excluded.

        Raises:
            UserError: a token id is not in the tokenizer's vocabulary.
        """
        ids, keep = tokens.cpu().numpy(), kept.cpu().numpy()
        n_ids = len(self._vocabulary.raw)
        if ids.size and not 0 <= ids.min() <= ids.max() < n_ids:
            raise UserError(
                f"token ids {ids.min()} to {ids.max()}: the tokenizer has ids 0 to {n_ids - 1}; "
                "use the tokenizer of the model that the tokens are for"
            )
        active = active_entries(feature_acts)
        if not keep.all():
            of_kept = keep.ravel()[active.token]
            active = ActiveEntries(*(column[of_kept] for column in active))
        routes = route.cpu().numpy().ravel()
        self._count(active, routes)
        candidates = self._candidates(active, ids, routes, weight.float().cpu().numpy().ravel())
        self.strongest.add(candidates, ids)
        self.n_sequences += len(ids)
        self.n_tokens += int(keep.sum())

    def _count(self, active: ActiveEntries, routes: Int[np.ndarray, " tokens"]) -> None:
        feature, activation = active.feature, active.value
        self._n_fired += np.bincount(
            feature * len(self.hook_names) + routes[active.token], minlength=len(self._n_fired)
        )
        self._sum_activation += np.bincount(feature, activation, minlength=self.d_sae)
        # few entries exceed the maximum, and `maximum.at` is slow
        record = activation > self._max_activation[feature]
        np.maximum.at(self._max_activation, feature[record], activation[record])

    def _candidates(
        self,
        active: ActiveEntries,
        ids: Int[np.ndarray, "batch pos"],
        routes: Int[np.ndarray, " tokens"],
        weights: Float[np.ndarray, " tokens"],
    ) -> np.ndarray:
        """Records of the type `CANDIDATE`, in the order of the stream."""
        classes = self._vocabulary.class_of[ids.ravel()]
        token, pair, activation = self.strongest.select(active, classes)
        windows = self._sentences.windows(ids)
        rows = np.empty(len(token), dtype=CANDIDATE)
        rows["pair"], rows["activation"] = pair, activation
        rows["weight"], rows["route"] = weights[token], routes[token]
        rows["sequence"], rows["position"] = np.divmod(token, ids.shape[1])
        rows["sequence"] += self.n_sequences
        rows["start"] = windows.start[token]
        rows["length"], rows["before"] = windows.length[token], windows.before[token]
        return rows

    def table(self, threshold: float | None = None) -> FeatureTable:
        """Contexts at one threshold, counts at every threshold, and the profiles so far.

        Args:
            threshold: `options.threshold` or one of `options.thresholds`; None is the former.

        Raises:
            UserError: the threshold is neither.
        """
        options = self.options if threshold is None else replace(self.options, threshold=threshold)
        if options.threshold not in self.options.all_thresholds:
            known = ", ".join(f"{known:g}" for known in self.options.all_thresholds)
            raise UserError(
                f"threshold={threshold}: contexts were collected at {known}; add it to "
                "options.thresholds"
            )
        self.strongest.merge()
        feature, token_class = np.divmod(self.strongest.pair, len(self._vocabulary.classes))
        above = {at: self._above(at, feature) for at in self.options.all_thresholds}
        here = above[options.threshold]
        shown = np.flatnonzero(here.rows & here.passes[feature])
        return FeatureTable(
            contexts=self._contexts(shown, feature[shown], token_class[shown]),
            features=self._profiles(here),
            run=ContextRun(
                options=options,
                hook_names=self.hook_names,
                routed_blocks=self.routed_blocks,
                d_sae=self.d_sae,
                n_tokens=self.n_tokens,
                n_sequences=self.n_sequences,
                counts=tuple(
                    ThresholdCount(at, int(a.passes.sum()), int(a.n_contexts[a.passes].sum()))
                    for at, a in above.items()
                ),
            ),
        )

    def _above(self, threshold: float, feature: Int[np.ndarray, " rows"]) -> _Above:
        options, pair = self.options, self.strongest.pair
        rows = self.strongest.activation > np.float32(threshold)
        # the first row of a pair is its strongest, so a class counts if its first row does
        first = np.ones(len(pair), dtype=bool)
        first[1:] = pair[1:] != pair[:-1]
        n_contexts = np.bincount(feature[rows], minlength=self.d_sae)
        n_classes = np.bincount(feature[rows & first], minlength=self.d_sae)
        passes = n_contexts >= options.min_contexts
        if options.max_classes is not None:
            passes &= n_classes <= options.max_classes
        return _Above(rows, n_contexts, n_classes, passes)

    def _contexts(
        self,
        rows: Int[np.ndarray, " n"],
        feature: Int[np.ndarray, " n"],
        token_class: Int[np.ndarray, " n"],
    ) -> pa.Table:
        records = self.strongest.rows(rows)
        texts, activated = [], []
        for window, length, before in zip(
            records["window"], records["length"].tolist(), records["before"].tolist(), strict=True
        ):
            ids = window[:length].tolist()
            texts.append(self._sentences.text(ids, before))
            activated.append(self._vocabulary.pieces[ids[before]])
        routes = records["route"].tolist()
        columns = [
            feature,
            [self._vocabulary.classes[i] for i in token_class.tolist()],
            activated,
            self.strongest.activation[rows],
            [self.routed_blocks[route] for route in routes],
            [self.hook_names[route] for route in routes],
            records["weight"],
            texts,
            records["sequence"],
            records["position"],
        ]
        table = _typed_table(columns, CONTEXT_SCHEMA)
        if self._sentences.ties_by_text:
            by = [("feature", "ascending"), ("token_class", "ascending")]
            table = table.sort_by([*by, ("activation", "descending"), ("text", "ascending")])
        return table

    def _profiles(self, above: _Above) -> pa.Table:
        blocks = self.routed_blocks
        counts = self._n_fired.reshape(self.d_sae, len(blocks))
        fired = counts.sum(1)
        share = counts / np.maximum(fired, 1)[:, None]
        mean_route = share @ np.arange(len(blocks))
        entropy = -(share * np.log(np.where(share > 0, share, 1.0))).sum(1)
        depth = np.where(mean_route < (len(blocks) - 1) / 2, "shallow", "deep")

        def if_fired(values: Iterable[object]) -> list[object]:
            return [value if n else None for value, n in zip(values, fired.tolist(), strict=True)]

        columns = [
            np.arange(self.d_sae),
            above.passes,
            above.n_contexts,
            above.n_classes,
            fired,
            fired / max(self.n_tokens, 1),
            self._max_activation,
            _pairs(blocks, counts),
            if_fired(_pairs(blocks, share)),
            if_fired((share @ np.array(blocks)).tolist()),
            if_fired(entropy.tolist()),
            if_fired(depth.tolist()),
            if_fired((self._sum_activation / np.maximum(fired, 1)).tolist()),
        ]
        return _typed_table(columns, FEATURE_SCHEMA)


class _Above(NamedTuple):
    """The rows of the table above one threshold."""

    rows: Bool[np.ndarray, " rows"]
    n_contexts: Int[np.ndarray, " d_sae"]
    n_classes: Int[np.ndarray, " d_sae"]
    passes: Bool[np.ndarray, " d_sae"]
    """Features that pass the filters."""


def _pairs(
    blocks: Sequence[int], values: Int[np.ndarray, "d_sae L"] | Float[np.ndarray, "d_sae L"]
) -> list[list[tuple[int, int | float]]]:
    """(block, value) of each feature, the form that pyarrow makes maps from."""
    return [list(zip(blocks, row, strict=True)) for row in values.tolist()]


def _typed_table(columns: Sequence[Any], schema: pa.Schema) -> pa.Table:
    arrays = [pa.array(c, type=f.type) for c, f in zip(columns, schema, strict=True)]
    return pa.table(arrays, schema=schema)
