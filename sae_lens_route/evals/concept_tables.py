"""Activations of a dictionary's features at annotated tokens, and the thresholds to cut them at.

A table holds `[tokens, features]`, sparse or dense. The scores need three things of it: all cuts of
all features in chunks (`cuts`), the tokens at which one feature is active (`active`), and where in
the model these activations come from (`share_by_block`).

In a dense table every column is two features, the column and its negation: feature `2 j` is column
j, feature `2 j + 1` its negation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import csc_array, hstack
from typing_extensions import override

CHUNK = 2**16
"""Activations to sort at a time. With ten concepts per token they make 650,000 pairs to count,
which fit a cache; chunks of 2**19 take twice as long."""


class Cuts(NamedTuple):
    """Activations of some features, sorted by feature and then from the largest to the smallest.

    Each activation is a cut: the feature is active at all its activations that are at least as
    large, that is, above `threshold`.
    """

    token: Int[np.ndarray, " n"]
    feature: Int[np.ndarray, " n"]
    n_active: Int[np.ndarray, " n"]
    """Tokens at which the feature is active with this cut."""
    threshold: Float[np.ndarray, " n"]
    """The feature's next smaller activation; below the smallest, the `floor` of `sorted_cuts`."""


class FeatureTable(ABC):
    """Activations `[tokens, features]`."""

    @property
    @abstractmethod
    def n_features(self) -> int:
        """Features, negations of dense columns included."""

    @abstractmethod
    def rows(self, tokens: slice) -> FeatureTable:
        """The table of some of the tokens."""

    @abstractmethod
    def cuts(self) -> Iterator[Cuts]:
        """All cuts of all features, a chunk of whole features at a time, in order."""

    @abstractmethod
    def active(self, feature: int, threshold: float) -> Int[np.ndarray, " n"]:
        """Tokens whose activation is above the threshold."""

    @abstractmethod
    def n_active(self) -> Int[np.ndarray, " n_features"]:
        """Tokens whose activation is above 0, of each feature."""

    @abstractmethod
    def column(self, feature: int) -> tuple[int, int]:
        """What people read of a feature: its column, and 1, or -1 for the negation."""

    @abstractmethod
    def share_by_block(self, feature: int, threshold: float) -> dict[int, float]:
        """Where the model's activations above the threshold come from; empty if there are none."""

    @abstractmethod
    def label_sums(self, labels: Bool[np.ndarray, "tokens C"]) -> Float[np.ndarray, "C columns"]:
        """Sum of each column over the tokens of each concept."""

    @abstractmethod
    def dense(self, columns: Int[np.ndarray, " k"]) -> Float[np.ndarray, "tokens k"]:
        """Some of the columns."""


def sorted_cuts(
    token: Int[np.ndarray, " n"],
    feature: Int[np.ndarray, " n"],
    value: Float[np.ndarray, " n"],
    floor: float,
) -> Cuts:
    """Cuts of activations that are sorted by feature and then from the largest to the smallest.

    Args:
        token: Token of each activation.
        feature: Feature of each activation, ascending.
        value: The activations.
        floor: The threshold below a feature's smallest activation.
    """
    n = len(value)
    if n == 0:
        return Cuts(token, feature, np.empty(0, np.int32), value)
    new_feature = feature[1:] != feature[:-1]
    is_last = np.append(new_feature | (value[1:] != value[:-1]), True)
    group = np.cumsum(is_last) - is_last  # of equal activations
    last = np.flatnonzero(is_last)
    below = np.append(value[last[:-1] + 1], floor)
    below[:-1][new_feature[last[:-1]]] = floor
    first = np.append(0, np.flatnonzero(new_feature) + 1)
    start = np.repeat(first, np.diff(np.append(first, n)))
    n_active = (last[group] - start + 1).astype(np.int32)
    return Cuts(token, feature, n_active, below[group])


@dataclass(frozen=True)
class SparseTable(FeatureTable):
    """Activations of which most are 0; a feature is active at a token if it is above 0."""

    values: csc_array
    """`[tokens, features]`, all stored values above 0."""
    blocks: csc_array
    """Of the same structure: the block that each activation was read from, plus 1."""
    blocks_of_features: dict[int, Float[np.ndarray, " n_features"]] | None = None
    """Share of each block in every feature, if that does not depend on where it is active."""

    @classmethod
    def of(
        cls,
        token: Int[np.ndarray, " n"],
        feature: Int[np.ndarray, " n"],
        value: Float[np.ndarray, " n"],
        block: Int[np.ndarray, " n"],
        shape: tuple[int, int],
    ) -> SparseTable:
        """Table of shape [tokens, features] with these activations, in any order."""
        at = (token, feature)
        return cls(csc_array((value, at), shape), csc_array((block + 1, at), shape))

    @classmethod
    def side_by_side(cls, tables: Sequence[SparseTable]) -> SparseTable:
        """The features of several tables of the same tokens, one table after the other."""
        values = csc_array(hstack([table.values for table in tables]))
        return cls(values, csc_array(hstack([table.blocks for table in tables])))

    @property
    @override
    def n_features(self) -> int:
        return len(self.values.indptr) - 1

    @override
    def rows(self, tokens: slice) -> SparseTable:
        values, blocks = csc_array(self.values[tokens]), csc_array(self.blocks[tokens])
        return SparseTable(values, blocks, self.blocks_of_features)

    @override
    def cuts(self) -> Iterator[Cuts]:
        ends = self.values.indptr
        start = 0
        while start < self.n_features:
            # the features that fit a chunk, one at least
            stop = int(np.searchsorted(ends, ends[start] + CHUNK, side="right")) - 1
            stop = min(max(stop, start + 1), self.n_features)
            part = slice(ends[start], ends[stop])
            feature = np.repeat(np.arange(start, stop), np.diff(ends[start : stop + 1]))
            value: np.ndarray = self.values.data[part]
            order = np.lexsort((-value, feature))
            yield sorted_cuts(self.values.indices[part][order], feature, value[order], 0.0)
            start = stop

    @override
    def active(self, feature: int, threshold: float) -> Int[np.ndarray, " n"]:
        part = self._part(feature)
        return self.values.indices[part][self.values.data[part] > threshold]

    @override
    def n_active(self) -> Int[np.ndarray, " n_features"]:
        return np.diff(self.values.indptr)

    @override
    def column(self, feature: int) -> tuple[int, int]:
        return feature, 1

    @override
    def share_by_block(self, feature: int, threshold: float) -> dict[int, float]:
        if self.blocks_of_features is not None:
            return {b: float(share[feature]) for b, share in self.blocks_of_features.items()}
        part = self._part(feature)
        above = self.blocks.data[part][self.values.data[part] > threshold]
        blocks, counts = np.unique(above - 1, return_counts=True)
        shares = counts / max(1, len(above))
        return dict(zip(blocks.tolist(), shares.tolist(), strict=True))

    @override
    def label_sums(self, labels: Bool[np.ndarray, "tokens C"]) -> Float[np.ndarray, "C columns"]:
        return (self.values.T @ labels.astype(np.float64)).T

    @override
    def dense(self, columns: Int[np.ndarray, " k"]) -> Float[np.ndarray, "tokens k"]:
        return self.values[:, columns].toarray()

    def _part(self, feature: int) -> slice:
        return slice(self.values.indptr[feature], self.values.indptr[feature + 1])


@dataclass(frozen=True)
class DenseTable(FeatureTable):
    """Activations that are all there, such as the dimensions of a residual stream."""

    values: Float[np.ndarray, "tokens d"]
    block: int
    """The block they were read from."""

    @property
    @override
    def n_features(self) -> int:
        return 2 * self.values.shape[1]

    @override
    def rows(self, tokens: slice) -> DenseTable:
        return DenseTable(self.values[tokens], self.block)

    @override
    def cuts(self) -> Iterator[Cuts]:
        n_tokens, n_columns = self.values.shape
        floor = float(np.finfo(self.values.dtype).min)  # below every activation
        width = max(1, CHUNK // (2 * max(1, n_tokens)))
        for start in range(0, n_columns, width):
            columns = np.ascontiguousarray(self.values[:, start : start + width].T)
            rising = columns.argsort(axis=1)
            value = np.take_along_axis(columns, rising, axis=1)
            # [columns, 2, tokens]: each column from its largest value, its negation likewise
            token = np.stack([rising[:, ::-1], rising], axis=1)
            value = np.stack([value[:, ::-1], -value], axis=1)
            feature = np.repeat(2 * start + np.arange(2 * len(columns)), n_tokens)
            yield sorted_cuts(token.ravel(), feature, value.ravel(), floor)

    @override
    def active(self, feature: int, threshold: float) -> Int[np.ndarray, " n"]:
        column, sign = self.column(feature)
        return np.flatnonzero(sign * self.values[:, column] > threshold)

    @override
    def n_active(self) -> Int[np.ndarray, " n_features"]:
        return np.stack([(self.values > 0).sum(0), (self.values < 0).sum(0)], axis=1).ravel()

    @override
    def column(self, feature: int) -> tuple[int, int]:
        return feature // 2, 1 - 2 * (feature % 2)

    @override
    def share_by_block(self, feature: int, threshold: float) -> dict[int, float]:
        return {self.block: 1.0}

    @override
    def label_sums(self, labels: Bool[np.ndarray, "tokens C"]) -> Float[np.ndarray, "C columns"]:
        return labels.T.astype(self.values.dtype) @ self.values

    @override
    def dense(self, columns: Int[np.ndarray, " k"]) -> Float[np.ndarray, "tokens k"]:
        return self.values[:, columns]
