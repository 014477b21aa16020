"""From passes of the language model to training batches, wherever the passes come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from sae_lens import logger
from sae_lens.util import str_to_dtype
from torch import Tensor

from sae_lens_route.config import RouteSAERunnerConfig
from sae_lens_route.data.kept_stream import KeptStream, PassSource
from sae_lens_route.data.shuffle_buffer import ShuffleBuffer
from sae_lens_route.errors import UserError
from sae_lens_route.memory import require_memory


@dataclass(frozen=True)
class BatchLayout:
    """What a batch is made of, and how many tokens are mixed.

    Args:
        n_blocks: Routed blocks L.
        width: Dimensions d of a residual stream.
        dtype: In which streams are kept.
        device: On which batches are made.
        batch_size: Tokens in a batch.
        pass_tokens: Tokens in a pass of the language model.
        n_batches_in_buffer: Passes' worth of tokens in the shuffle buffer.
        kept_share: Share of the buffer that stays in it when it is filled again; 0 reads the text
            in order, without a buffer.
        seed: Of the order.
    """

    n_blocks: int
    width: int
    dtype: torch.dtype
    device: torch.device
    batch_size: int
    pass_tokens: int
    n_batches_in_buffer: int
    kept_share: float
    seed: int

    @classmethod
    def of(cls, cfg: RouteSAERunnerConfig, dtype: str) -> BatchLayout:
        """The layout of a run that is resolved, whose streams are kept in `dtype`."""
        kept = len(range(cfg.context_size)[slice(*cfg.seqpos_slice)])
        return cls(
            n_blocks=len(cfg.routed_blocks or ()),
            width=cfg.d_model,
            dtype=str_to_dtype(dtype),
            device=torch.device(cfg.act_store_device or cfg.device),
            batch_size=cfg.step_tokens,
            pass_tokens=cfg.store_batch_size_prompts * kept,
            n_batches_in_buffer=cfg.n_batches_in_buffer,
            kept_share=cfg.activations_mixing_fraction,
            seed=cfg.seed,
        )

    @property
    def buffer_tokens(self) -> int:
        """Tokens in the shuffle buffer; 0 when tokens are read in order."""
        return self.n_batches_in_buffer * self.pass_tokens if self.kept_share else 0

    @property
    def batches_per_round(self) -> int:
        """Batches that are served before their rows of the shuffle buffer are filled again."""
        n_served = int(self.buffer_tokens * (1 - self.kept_share))
        return max(1, n_served // self.batch_size)

    def tokens_read(self, n_batches: int) -> int:
        """Kept tokens that have been read from the text when so many batches have been made."""
        if not self.buffer_tokens:
            return n_batches * self.batch_size
        n_refills = (n_batches - 1) // self.batches_per_round
        return self.buffer_tokens + n_refills * self.batches_per_round * self.batch_size

    def empty(self, n_tokens: int) -> Tensor:
        """Room for so many tokens."""
        shape = (n_tokens, self.n_blocks, self.width)
        return torch.empty(shape, dtype=self.dtype, device=self.device)


@runtime_checkable
class BatchStore(Protocol):
    """What a run trains from: endless batches, and positions in the text to go on from."""

    text_sha256: str
    """Of the contexts of the first pass: tells one text, or tokenizer, from another."""

    @property
    def model_lock(self) -> RLock:
        """Held while passes are made."""
        ...

    def __iter__(self) -> Iterator[Float[Tensor, "tokens L d"]]: ...

    def __next__(self) -> Float[Tensor, "tokens L d"]: ...

    def state_dict(self) -> dict[str, Tensor]:
        """The position after the last batch."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go to a position."""
        ...

    def load_from_checkpoint(self, checkpoint_path: str | Path) -> None:
        """Go to the position of a checkpoint."""
        ...

    def from_the_start(self) -> BatchStore:
        """Another store on the same text and model, at the start of the text."""
        ...

    def close(self) -> None:
        """Write what is still to be written to a cache."""
        ...


class TrainingBatches:
    """Endless batches `[tokens, L, d]`, from any position in the text.

    Args:
        source: Where passes come from, at the start of the text.
        layout: What a batch is made of.
    """

    def __init__(self, source: PassSource, layout: BatchLayout) -> None:
        self._layout, self._stream = layout, KeptStream(source)
        self._buffer = ShuffleBuffer(
            self._stream, layout.batches_per_round, layout.batch_size, layout.seed
        )

    def __iter__(self) -> Iterator[Float[Tensor, "tokens L d"]]:
        return self._shuffled() if self._layout.buffer_tokens else self._in_order()

    def _in_order(self) -> Iterator[Tensor]:
        while True:
            # a new tensor each time, because prefetching holds several batches at once
            batch = self._layout.empty(self._layout.batch_size)
            self._stream.fill(batch)
            yield batch

    def _shuffled(self) -> Iterator[Tensor]:
        layout, n = self._layout, self._layout.buffer_tokens
        if n < layout.batch_size:
            raise UserError(
                f"n_batches_in_buffer={layout.n_batches_in_buffer}: the shuffle buffer would hold "
                f"{n:,} tokens, fewer than train_batch_size_tokens={layout.batch_size:,}"
            )
        n_bytes = n * layout.n_blocks * layout.width * layout.dtype.itemsize
        logger.info(
            f"shuffle buffer: {n:,} tokens x {layout.n_blocks} blocks x {layout.width} = "
            f"{n_bytes / 1e9:.2f} GB on {layout.device}"
        )
        n_batches = layout.n_batches_in_buffer
        require_memory(n_bytes, layout.device, "n_batches_in_buffer", n_batches)
        yield from self._buffer.batches(layout.empty(n))

    def state(self) -> dict[str, Tensor]:
        """The position after the last batch."""
        first_context, n_used = self._stream.position
        return {
            "n_sequences": torch.tensor(first_context),
            "n_used": torch.tensor(n_used),
            **self._buffer.state(),
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go to a position: skip the text before it, run again the passes that are still in use.

        Raises:
            UserError: the text before it is another one. With a shuffle buffer, the first batch
                raises this.
        """
        position = int(state["n_sequences"]), int(state["n_used"])
        if "buffer_sources" in state:
            self._buffer.load(state)
            self._stream.expect(*position)
        else:
            self._stream.go_to(*position)
