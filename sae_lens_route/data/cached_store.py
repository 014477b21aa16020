"""Training batches from an activation cache alone, without the language model or its text."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from sae_lens.constants import ACTIVATIONS_STORE_STATE_FILENAME
from safetensors.torch import load_file
from torch import Tensor

from sae_lens_route.config import RouteSAERunnerConfig
from sae_lens_route.data.activation_shards import ActivationShards
from sae_lens_route.data.cached_passes import CachedPasses
from sae_lens_route.data.training_batches import BatchLayout, TrainingBatches


class CachedActivationsStore:
    """The batches that `RoutedActivationsStore` would make, and its positions.

    Args:
        cfg: The run, resolved.
        shards: A cache that holds all that it reads.
    """

    def __init__(self, cfg: RouteSAERunnerConfig, shards: ActivationShards) -> None:
        self._shards, self._contexts_per_pass = shards, cfg.store_batch_size_prompts
        self.layout = BatchLayout.of(cfg, shards.manifest.dtype)
        self.text_sha256 = shards.manifest.text_sha256
        blocks = shards.manifest.blocks
        self._positions = [blocks.index(block) for block in cfg.routed_blocks or ()]
        self.model_lock = threading.RLock()
        self._rewind()

    def _rewind(self) -> None:
        passes = CachedPasses(
            self._shards, self._positions, self._contexts_per_pass, lock=self.model_lock
        )
        self._batches = TrainingBatches(passes, self.layout)
        self._iterator = iter(self._batches)

    def __iter__(self) -> Iterator[Float[Tensor, "tokens L d"]]:
        return self

    def __next__(self) -> Float[Tensor, "tokens L d"]:
        return next(self._iterator)

    def from_the_start(self) -> CachedActivationsStore:
        """Another store on the same cache, at its start."""
        store = copy.copy(self)
        store._rewind()
        return store

    def state_dict(self) -> dict[str, Tensor]:
        """The position after the last batch."""
        return {"n_dataset_processed": torch.tensor(0), **self._batches.state()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go to a position, as `TrainingBatches.load` does."""
        self._rewind()
        self._batches.load(state)

    def load_from_checkpoint(self, checkpoint_path: str | Path) -> None:
        """Go to the position of a checkpoint."""
        self.load_state(load_file(Path(checkpoint_path) / ACTIVATIONS_STORE_STATE_FILENAME))

    def close(self) -> None:
        """There is nothing to be written."""
