"""The strongest contexts of every feature and token class, in memory of a fixed size.

A candidate is an activation above the lowest threshold, with its sentence. A *pair* is a feature
with a class of activated token, numbered `feature * n_classes + class`.

1. *Select.* Candidates that cannot enter the table any more are dropped.
2. *Queue.* The others wait, with the tokens their sentences are cut from.
3. *Merge.* Of each pair, the `max_per_class` strongest candidates stay; of each feature, the N =
   `max_contexts_per_feature` strongest of those. Only these get their sentences copied.

The result does not depend on the batch size: candidates have a total order, by activation, and for
equal activations the earlier in the stream comes first.

**Memory.** The table holds at most `d_sae * N` rows of `4 * max_length + 42` bytes, and 1.5 times
that while it grows: 0.6 GB for d_sae 16384 if every feature is full. The queue holds at most 2^17
rows of 42 bytes (or half as many as the table, if that is more) and 2^22 tokens, plus one batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float32, Int

from sae_lens_route.features.active import ActiveEntries
from sae_lens_route.features.sentences import DecodedSentences
from sae_lens_route.features.table import ContextOptions

MIN_QUEUE = 2**17
"""Candidates to collect before a merge is worth its cost."""

MAX_QUEUE_TOKENS = 2**22

# what a candidate and a row of the table both have
_SHARED_FIELDS = [
    ("weight", np.float32),
    ("sequence", np.int64),
    ("position", np.int32),
    ("length", np.int16),  # of the window
    ("before", np.int16),  # tokens of the window before the activated one
    ("route", np.int16),
]

CANDIDATE = np.dtype(
    [
        ("pair", np.int64),
        ("activation", np.float32),
        ("start", np.int64),  # of the window, in the flattened batch, then in the queue's tokens
        *_SHARED_FIELDS,
    ]
)


class StrongestContexts:
    """The table of the strongest candidates so far: `select`, `add` in turn, and `merge` to read.

    Args:
        d_sae: Number of features.
        n_classes: Number of token classes.
        sentences: Where windows are cut, and how they read.
        options: The thresholds, and how many contexts to keep.
    """

    def __init__(
        self, d_sae: int, n_classes: int, sentences: DecodedSentences, options: ContextOptions
    ) -> None:
        self._d_sae = d_sae
        self._n_classes = n_classes
        self._sentences = sentences
        self._max_per_class = options.max_per_class
        self._cap = options.max_contexts_per_feature
        self._lowest = np.float32(min(options.all_thresholds))
        # a candidate below its feature's floor cannot enter; raised once a feature has N rows
        self._floor = np.full(d_sae, self._lowest, dtype=np.float32)
        # the rows, ordered by pair, then falling activation, then stream
        self.pair = np.empty(0, dtype=np.int64)
        self.activation = np.empty(0, dtype=np.float32)
        # where the rest of each row lies in the store, which is not ordered, so that a merge
        # moves the three short columns above instead of whole windows
        self._slot = np.empty(0, dtype=np.int64)
        window = ("window", np.int32, (sentences.width,))
        self._store = np.empty(0, dtype=np.dtype([*_SHARED_FIELDS, window]))
        self._free = np.empty(0, dtype=np.int64)
        self._queue = _Queue()

    @property
    def max_rows(self) -> int:
        """The most rows the table can hold."""
        return self._d_sae * self._cap

    @property
    def n_rows(self) -> int:
        """Rows of the table and candidates in the queue."""
        return len(self.pair) + self._queue.n_rows

    def rows(self, index: Int[np.ndarray, " n"]) -> np.ndarray:
        """Records of some rows: weight, sequence, position, length, before, route, window."""
        return self._store[self._slot[index]]

    def select(
        self, active: ActiveEntries, token_class: Int[np.ndarray, " tokens"]
    ) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
        """Token, pair and activation of the entries of a batch that can still enter the table."""
        token, feature, activation = active
        # at the floor itself a candidate may still win a tie against a later class
        keep = (activation > self._lowest) & (activation >= self._floor[feature])
        token, feature, activation = token[keep], feature[keep], activation[keep]
        pair = feature * self._n_classes
        pair += token_class[token]
        keep = self._has_room(pair, activation)
        return token[keep], pair[keep], activation[keep]

    def _has_room(
        self, pair: Int[np.ndarray, " n"], activation: Float32[np.ndarray, " n"]
    ) -> Bool[np.ndarray, " n"]:
        """False where the pair already has `max_per_class` rows that are all at least as strong."""
        if not len(self.pair):
            return np.ones(len(pair), dtype=bool)
        # sorting the keys first makes the search five times faster: neighbors share cache lines
        order = np.argsort(pair)
        # the row that is the pair's weakest if the pair is full, else a row of a later pair
        last = np.empty_like(order)
        last[order] = np.searchsorted(self.pair, pair[order]) + self._max_per_class - 1
        full = last < len(self.pair)
        last[~full] = 0
        full &= self.pair[last] == pair
        weakest = self.activation[last]
        # an equal activation comes later in the stream, so it loses, unless texts decide
        loses = activation < weakest if self._sentences.ties_by_text else activation <= weakest
        return ~(full & loses)

    def add(self, candidates: np.ndarray, ids: Int[np.ndarray, "batch pos"]) -> None:
        """Queue candidates of the next batch, and merge if the queue is full.

        Args:
            candidates: Records of the type `CANDIDATE`, in the order of the stream.
            ids: Token ids of the batch.
        """
        self._queue.append(candidates, ids)
        if (
            self._queue.n_rows >= max(MIN_QUEUE, len(self.pair) // 2)
            or self._queue.n_tokens >= MAX_QUEUE_TOKENS
        ):
            self.merge()

    def merge(self) -> None:
        """Move the queue's candidates to the table."""
        if not self._queue.n_rows:
            return
        n_old = len(self.pair)
        candidates, windows = self._queue.take(self._sentences.width)
        self._queue = _Queue()
        # `source` numbers where a row comes from: old rows first, then candidates
        pair, activation, source = self._merged(candidates)
        if self._sentences.ties_by_text:
            self._order_ties_by_text(pair, activation, source, candidates, windows)

        keep = np.flatnonzero(_rank_in_group(pair) < self._max_per_class)
        keep = keep[self._within_cap(pair[keep], activation[keep])]
        self.pair, self.activation, source = pair[keep], activation[keep], source[keep]

        # old rows that stay keep their slots; candidates get those of the rows that left
        old = source < n_old
        stays = np.zeros(n_old, dtype=bool)
        stays[source[old]] = True
        slot = np.empty(len(source), dtype=np.int64)
        slot[old] = self._slot[source[old]]
        slot[~old] = new = self._take_slots(int((~old).sum()), self._slot[~stays])
        self._slot = slot
        entered = candidates[source[~old] - n_old]
        for name, _ in _SHARED_FIELDS:
            self._store[name][new] = entered[name]
        self._store["window"][new] = windows[entered["start"]]

    def _merged(
        self, candidates: np.ndarray
    ) -> tuple[Int[np.ndarray, " n"], Float32[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """Pair, activation and source of the table's rows and the candidates, in the table's order.

        The sources of the rows are their numbers; those of the candidates continue the count.
        """
        n_old = len(self.pair)
        # lexsort is stable and the candidates are in the order of the stream, so of equal
        # activations the earlier stays first
        order = np.lexsort((-candidates["activation"], candidates["pair"]))
        new_pair, new_activation = candidates["pair"][order], candidates["activation"][order]
        # the table is sorted already: instead of sorting all again, find where each candidate
        # belongs, behind the rows of its pair (`max_per_class` at most) that are as strong
        at = first = np.searchsorted(self.pair, new_pair)
        for i in range(min(self._max_per_class, n_old)):
            row = np.minimum(first + i, n_old - 1)
            stronger = (self.pair[row] == new_pair) & (self.activation[row] >= new_activation)
            at = at + (stronger & (first + i < n_old))
        return (
            np.insert(self.pair, at, new_pair),
            np.insert(self.activation, at, new_activation),
            np.insert(np.arange(n_old), at, n_old + order),
        )

    def _within_cap(
        self, pair: Int[np.ndarray, " n"], activation: Float32[np.ndarray, " n"]
    ) -> Bool[np.ndarray, " n"]:
        """True for the N strongest rows of each feature; raises the floor of full features.

        Rows are ordered by pair; of equal activations at the cut, the first ones stay.
        """
        feature = pair // self._n_classes
        count = np.bincount(feature, minlength=self._d_sae)
        if count.max(initial=0) <= self._cap:
            return np.ones(len(pair), dtype=bool)
        # The bits of positive floats, read as integers, have the order of the floats. With the
        # feature in the high half and the inverted bits in the low half, one sort of integers
        # lists every feature's activations from the strongest to the weakest.
        falling = np.sort(
            (feature << 32) | (0xFFFFFFFF - activation.view(np.uint32).astype(np.int64))
        )
        full = np.flatnonzero(count > self._cap)
        # feature f starts at cumsum(count)[f] - count[f]; its N-th activation is the new floor
        weakest = falling[np.cumsum(count)[full] - count[full] + self._cap - 1]
        floor = (0xFFFFFFFF - (weakest & 0xFFFFFFFF)).astype(np.uint32).view(np.float32)
        self._floor[full] = floor
        limit = np.full(self._d_sae, -1, dtype=np.float32)
        limit[full] = floor
        # all rows above the limit stay, and as many of those at the limit as still fit
        keep = activation > limit[feature]
        room = self._cap - np.bincount(feature[keep], minlength=self._d_sae)
        at_limit = np.flatnonzero(activation == limit[feature])
        tied = feature[at_limit]
        keep[at_limit[_rank_in_group(tied) < room[tied]]] = True
        return keep

    def _take_slots(self, n: int, freed: Int[np.ndarray, " m"]) -> Int[np.ndarray, " n"]:
        """Slots for n rows that enter, after the rows that left have freed theirs."""
        free = np.concatenate([self._free, freed])
        if n > len(free):
            size = len(self._store)
            # doubling makes growth cheap; more than `max_rows` is never needed
            grown = max(size + n - len(free), min(2 * size, self.max_rows))
            free = np.concatenate([free, np.arange(size, grown)])
            store = np.empty(grown, dtype=self._store.dtype)
            store[:size] = self._store
            self._store = store
        self._free = free[n:]
        return free[:n]

    def _order_ties_by_text(
        self,
        pair: Int[np.ndarray, " n"],
        activation: Float32[np.ndarray, " n"],
        source: Int[np.ndarray, " n"],
        candidates: np.ndarray,
        windows: Int[np.ndarray, "m width"],
    ) -> None:
        """Sort `source` in place, by falling text, where a tie spans the cut at `max_per_class`.

        The reference keeps the largest (activation, text) of a pair.
        """
        rank, n_old = _rank_in_group(pair), len(self.pair)
        starts_tie = np.ones(len(pair), dtype=bool)
        starts_tie[1:] = (pair[1:] != pair[:-1]) | (activation[1:] != activation[:-1])
        first = np.flatnonzero(starts_tie)
        last = np.append(first[1:], len(pair)) - 1
        # texts are built one at a time, so only for ties of which some rows stay and some go
        spans_cut = (rank[first] < self._max_per_class) & (rank[last] >= self._max_per_class)

        def text(row: int) -> str:
            if row < n_old:
                record = self._store[self._slot[row]]
                window = record["window"]
            else:
                record = candidates[row - n_old]
                window = windows[record["start"]]
            ids = window[: record["length"]].tolist()
            return self._sentences.text(ids, int(record["before"]))

        for a, b in zip(first[spans_cut].tolist(), last[spans_cut].tolist(), strict=True):
            source[a : b + 1] = sorted(source[a : b + 1].tolist(), key=text, reverse=True)


@dataclass
class _Queue:
    """Candidates that wait for a merge, and the tokens that their windows are cut from."""

    candidates: list[np.ndarray] = field(default_factory=list)
    tokens: list[Int[np.ndarray, " n"]] = field(default_factory=list)
    n_rows: int = 0
    n_tokens: int = 0

    def append(self, candidates: np.ndarray, ids: Int[np.ndarray, "batch pos"]) -> None:
        if not len(candidates):
            return
        candidates["start"] += self.n_tokens
        self.candidates.append(candidates)
        self.tokens.append(ids.astype(np.int32).ravel())
        self.n_rows += len(candidates)
        self.n_tokens += ids.size

    def take(self, width: int) -> tuple[np.ndarray, Int[np.ndarray, "m width"]]:
        """The candidates, and a view of the tokens whose row i is the window that starts at i."""
        beyond = np.zeros(width, dtype=np.int32)  # the last windows reach past the last token
        tokens = np.concatenate([*self.tokens, beyond])
        windows = np.lib.stride_tricks.sliding_window_view(tokens, width)
        return np.concatenate(self.candidates), windows


def _rank_in_group(group: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """0, 1, 2, ... within each run of equal values."""
    index = np.arange(len(group))
    starts = np.ones(len(group), dtype=bool)
    starts[1:] = group[1:] != group[:-1]
    return index - np.maximum.accumulate(np.where(starts, index, 0))
