"""Forward passes from an activation cache, and from the language model where the cache ends."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from sae_lens_route.data.activation_shards import ActivationShards
from sae_lens_route.data.kept_stream import ForwardPass, PassSource
from sae_lens_route.errors import UserError


class CachedPasses:
    """Passes that are in a cache; the others are computed, and appended to it.

    Args:
        shards: The cache.
        positions: Of the blocks to read, among those of the cache.
        contexts_per_pass: Contexts in a pass.
        live: Computes what is not there; None if all is.
        lock: Held while a pass is made, because several threads may ask.
    """

    def __init__(
        self,
        shards: ActivationShards,
        positions: Sequence[int],
        contexts_per_pass: int,
        live: PassSource | None = None,
        lock: AbstractContextManager[Any] | None = None,
    ) -> None:
        self._shards, self._positions, self._live = shards, list(positions), live
        self._contexts_per_pass, self._next = contexts_per_pass, 0
        self._lock = threading.RLock() if lock is None else lock

    def skip_to(self, n_contexts: int) -> None:
        """Go to the pass that begins after so many contexts."""
        self._next = n_contexts // self._contexts_per_pass

    def next_pass(self) -> ForwardPass:
        """The kept tokens of the next pass.

        Raises:
            UserError: the cache ends before it, and there is no model.
        """
        with self._lock:
            n = self._next
            while self._shards.n_passes <= n:
                self._compute()
            streams = self._shards.streams(n, self._positions)
            self._next += 1
        return ForwardPass(streams, torch.arange(len(streams[0])), n * self._contexts_per_pass)

    def _compute(self) -> None:
        """Append the first pass that is not there: those before the one asked for, too."""
        n = self._shards.n_passes
        if self._live is None:
            raise UserError(
                f"cache_activations={str(self._shards.folder)!r}: ends after {n} passes; a run "
                "that needs more has to load the language model"
            )
        self._live.skip_to(n * self._contexts_per_pass)
        computed = self._live.next_pass()
        kept = computed.kept
        rows = [stream[kept.to(stream.device)].cpu() for stream in computed.streams]
        self._shards.add(torch.stack(rows, dim=1))
