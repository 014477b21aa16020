"""Dictionaries as readers of the same residual streams, to compare which concepts they recover.

A reader turns a batch of streams into the activations of its features at the kept tokens (`read`),
and the parts of all batches into one table (`table`). Readers of SAEs are here, the baselines that
need no training in `concept_baselines.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_route.data.reading import ActivationBatch
from sae_lens_route.errors import UserError
from sae_lens_route.evals.concept_tables import FeatureTable, SparseTable
from sae_lens_route.saes.kinds import is_crosscoder
from sae_lens_route.saes.metadata import routed_blocks
from sae_lens_route.saes.multi_layer import MultiLayerTopKTrainingSAE
from sae_lens_route.saes.routed import RoutedSAEMixin
from sae_lens_route.saes.router import normalize
from sae_lens_route.saes.units import in_units


@runtime_checkable
class FeatureReader(Protocol):
    """Features of residual streams, trained or not."""

    name: str
    """What its results are called."""

    @property
    def saes(self) -> Sequence[Any]:
        """SAEs whose metadata says which streams are read, and which tokens are kept."""
        ...

    def read(self, batch: ActivationBatch) -> Any:
        """Activations of the features at the kept tokens of a batch."""
        ...

    def table(self, parts: Sequence[Any], n_dev: int) -> FeatureTable:
        """Table of what `read` returned for all batches.

        Args:
            parts: One for each batch, in order.
            n_dev: The first tokens, all that may be fitted to.
        """
        ...


class Firings(NamedTuple):
    """Activations above 0 at the kept tokens of a batch."""

    token: Int[np.ndarray, " n"]
    """Position among the kept tokens."""
    feature: Int[np.ndarray, " n"]
    value: Float[np.ndarray, " n"]
    block: Int[np.ndarray, " n"]
    """The block that was read."""
    n_tokens: int
    """Kept tokens of the batch."""


def feature_activations(
    sae: Any, streams: Float[Tensor, "tokens L d"]
) -> tuple[Float[Tensor, "tokens d_sae"], Int[Tensor, " tokens"]]:
    """Feature activations of residual streams, and the route that each token was read at.

    They are in units of n(x) (`saes/units.py`), so that one threshold means the same at every token
    whatever its p. A crosscoder reads all blocks; its routes are 0.
    """
    if is_crosscoder(sae):
        return sae.encode_layers(streams), streams.new_zeros(len(streams), dtype=torch.int64)
    routing = sae.route(streams)
    return in_units(sae.encode(routing.x_route), routing, sae), routing.route


class SAEReader:
    """The features of a RouteSAE or a crosscoder.

    A feature of a RouteSAE lives at the blocks it was read from, one of a crosscoder at all blocks
    by the norms of its decoder.
    """

    def __init__(self, name: str, sae: Any) -> None:
        if not (is_crosscoder(sae) or isinstance(sae, RoutedSAEMixin)):
            raise UserError(
                f"{name}: a {type(sae).__name__} is neither a RouteSAE nor a crosscoder; an SAE "
                "trained on n(x) of one block becomes a RouteSAE by `saes.inference.as_routed`"
            )
        self.name, self.sae = name, sae

    @property
    def saes(self) -> Sequence[Any]:
        return [self.sae]

    def read(self, batch: ActivationBatch) -> Firings:
        streams = batch.of(self.sae)
        streams = streams[batch.kept.to(streams.device)]
        acts, routes = self.activations(streams)
        return _firings(acts, routes, routed_blocks(self.sae))

    def activations(
        self, streams: Float[Tensor, "tokens L d"]
    ) -> tuple[Float[Tensor, "tokens d_sae"], Int[Tensor, "tokens d_sae"]]:
        """Feature activations, and the route that each was read at."""
        acts, routes = feature_activations(self.sae, streams)
        return acts, routes.unsqueeze(-1).expand_as(acts)

    def table(self, parts: Sequence[Firings], n_dev: int) -> SparseTable:
        sizes = [part.n_tokens for part in parts]
        starts = np.cumsum([0, *sizes])
        token, feature, value, block = (
            np.concatenate(field) for field in list(zip(*parts, strict=True))[:4]
        )
        token = token + np.repeat(starts[:-1], [len(part.token) for part in parts])
        shape = (int(starts[-1]), int(self.sae.cfg.d_sae))
        table = SparseTable.of(token, feature, value, block, shape)
        if not is_crosscoder(self.sae):
            return table
        norms = self.sae.decoder_block_norms().detach().double()
        shares = (norms / norms.sum(-1, keepdim=True)).T.cpu().numpy()
        by_block = dict(zip(routed_blocks(self.sae), shares, strict=True))
        return SparseTable(table.values, table.blocks, by_block)


class MultiLayerReader(SAEReader):
    """The features of a multi-layer SAE, which reads the streams of all blocks one by one.

    A feature's activation at a token is the largest over the blocks, and it lives where that is.
    """

    def __init__(self, name: str, sae: Any) -> None:
        super().__init__(name, sae)
        if is_crosscoder(sae):
            raise UserError(f"{name}: a crosscoder reads all blocks at once, not one by one")

    def activations(
        self, streams: Float[Tensor, "tokens L d"]
    ) -> tuple[Float[Tensor, "tokens d_sae"], Int[Tensor, "tokens d_sae"]]:
        first, *others = streams.to(self.sae.dtype).unbind(-2)
        largest = self.sae.encode(normalize(first))
        routes = torch.zeros_like(largest, dtype=torch.int64)
        for i, stream in enumerate(others, start=1):
            acts = self.sae.encode(normalize(stream))
            routes = torch.where(acts > largest, i, routes)
            largest = torch.maximum(acts, largest)
        return largest, routes


def reader_of(name: str, sae: Any) -> SAEReader:
    """The reader that suits the class of an SAE.

    A saved multi-layer SAE loads as a RouteSAE with uniform routing, and is read as one here. To
    read all its blocks, use `MultiLayerReader`.
    """
    multi_layer = isinstance(sae, MultiLayerTopKTrainingSAE)
    return MultiLayerReader(name, sae) if multi_layer else SAEReader(name, sae)


class UnionReader:
    """The features of several SAEs together, such as one for each block."""

    def __init__(self, name: str, readers: Sequence[SAEReader]) -> None:
        if not readers or any(is_crosscoder(reader.sae) for reader in readers):
            raise UserError(f"{name}: a union is one of RouteSAEs, one at least")
        self.name, self.readers = name, list(readers)

    @property
    def saes(self) -> Sequence[Any]:
        return [reader.sae for reader in self.readers]

    def read(self, batch: ActivationBatch) -> list[Firings]:
        return [reader.read(batch) for reader in self.readers]

    def table(self, parts: Sequence[list[Firings]], n_dev: int) -> SparseTable:
        by_reader = zip(self.readers, zip(*parts, strict=True), strict=True)
        return SparseTable.side_by_side([reader.table(part, n_dev) for reader, part in by_reader])


def _firings(
    acts: Float[Tensor, "tokens d_sae"],
    routes: Int[Tensor, "tokens d_sae"],
    blocks: Sequence[int],
) -> Firings:
    token, feature = (acts > 0).nonzero(as_tuple=True)
    value = acts[token, feature].detach()
    if value.dtype in (torch.float16, torch.bfloat16):  # which numpy lacks or scipy refuses
        value = value.float()
    firings = token, feature, value, routes[token, feature]
    token, feature, value, route = (part.cpu().numpy() for part in firings)
    block = np.asarray(blocks, dtype=np.int16)[route]
    return Firings(token.astype(np.int32), feature.astype(np.int32), value, block, len(acts))
