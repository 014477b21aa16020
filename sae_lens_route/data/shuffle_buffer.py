"""A shuffle buffer whose content can be made again from a few numbers per row.

A position holds where each row of the buffer comes from (the first context of its pass, its index
among the kept tokens), the generator's state before the current order was drawn, and how much of
that order has been served. On resuming, the passes that hold rows of the buffer run again; the
buffer itself, L * d numbers per row, is never written to the disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_route.data.kept_stream import KeptStream, write
from sae_lens_route.data.row_digest import ANOTHER_TEXT
from sae_lens_route.errors import UserError


class ShuffleBuffer:
    """Serves rows in random order and fills their places from the stream.

    Args:
        stream: Where tokens come from.
        n_served: Batches that are served before their rows are filled again.
        batch_size: Tokens in a batch.
        seed: Of the order.
    """

    def __init__(self, stream: KeptStream, n_served: int, batch_size: int, seed: int) -> None:
        self._stream, self._batch_size, self._n_served = stream, batch_size, n_served
        self._generator = torch.Generator().manual_seed(seed)
        self._order_state = self._generator.get_state()
        self._sources: Int[Tensor, "n 2"] | None = None
        self._n_batches_served = 0

    def state(self) -> dict[str, Tensor]:
        """What `load` needs, after the last batch; the tensors in it are never changed."""
        if self._sources is None:
            return {}
        return {
            "buffer_sources": self._sources,
            "buffer_order": self._order_state,
            "buffer_batches_served": torch.tensor(self._n_batches_served),
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over the state of a buffer of the same size on the same text.

        `batches` then fills the buffer as it was and continues from the position that the stream
        expects. It raises a UserError if the text turns out to be another one.
        """
        self._sources = state["buffer_sources"].clone()
        self._order_state = state["buffer_order"].clone()
        self._generator.set_state(self._order_state)
        self._n_batches_served = int(state["buffer_batches_served"])

    def batches(self, rows: Float[Tensor, "n L d"]) -> Iterator[Float[Tensor, "tokens L d"]]:
        """Endless batches; `rows` is the buffer, allocated by the caller."""
        sources = self._sources
        if sources is None:
            sources = self._stream.fill(rows)
        else:
            self._refill(rows, sources)
        while True:
            self._sources, self._order_state = sources, self._generator.get_state()
            order = torch.randperm(len(rows), generator=self._generator)
            served = order[: self._n_served * self._batch_size]
            on_device = served.to(rows.device)
            for batch in on_device.split(self._batch_size)[self._n_batches_served :]:
                self._n_batches_served += 1
                yield rows[batch]
            self._n_batches_served = 0
            # a new tensor, because earlier states hold the one before
            sources = sources.index_copy(0, served, self._stream.fill(rows, on_device))

    def _refill(self, rows: Float[Tensor, "n L d"], sources: Int[Tensor, "n 2"]) -> None:
        position = self._stream.position
        for first_context in sources[:, 0].unique().tolist():
            source = self._stream.pass_at(first_context)
            which = (sources[:, 0] == first_context).nonzero().squeeze(-1)
            used = sources[which, 1]
            if int(used.max()) >= len(source.kept):
                raise UserError(ANOTHER_TEXT)
            write(rows, which.to(rows.device), source, used)
        self._stream.go_to(*position)
