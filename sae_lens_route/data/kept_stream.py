"""The kept tokens of one forward pass after another, from any position in the text."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_route.errors import UserError

_MOST_EMPTY_PASSES = 1000
"""Passes in a row without a kept token after which a text is given up."""


class ForwardPass(NamedTuple):
    """One forward pass of the language model over `store_batch_size_prompts` contexts."""

    streams: list[Float[Tensor, "tokens d"]]
    """Residual streams after the routed blocks, in order, of all tokens."""
    kept: Int[Tensor, " kept"]
    """Indices of the tokens that are not excluded."""
    first_context: int
    """How many contexts had been read before this pass."""


@runtime_checkable
class PassSource(Protocol):
    """Where forward passes come from: the language model, or a cache of what it computed."""

    def next_pass(self) -> ForwardPass:
        """Of the next contexts."""
        ...

    def skip_to(self, n_contexts: int) -> None:
        """Skip the text before a number of contexts; only forwards."""
        ...


class KeptStream:
    """Reads passes and copies the streams of their kept tokens, each once."""

    def __init__(self, source: PassSource) -> None:
        self._source = source
        self._current: ForwardPass | None = None
        self._position = 0, 0

    @property
    def position(self) -> tuple[int, int]:
        """Contexts read before the current pass, and tokens used of that pass."""
        return self._position

    def expect(self, first_context: int, n_used: int) -> None:
        """Report a position that is gone to later."""
        self._position = first_context, n_used

    def go_to(self, first_context: int, n_used: int) -> None:
        """Continue at a position that is not behind the current pass."""
        if self._current is None or self._current.first_context != first_context:
            self._source.skip_to(first_context)
            self._current = self._source.next_pass() if n_used else None
        self._position = first_context, n_used

    def pass_at(self, first_context: int) -> ForwardPass:
        """Run the pass that begins at a context again, and make it the current one."""
        self._source.skip_to(first_context)
        self._position = first_context, 0
        self._current = self._source.next_pass()
        return self._current

    def fill(
        self, out: Float[Tensor, "rows L d"], rows: Int[Tensor, " n"] | None = None
    ) -> Int[Tensor, "n 2"]:
        """Write the next kept tokens into `out`, or into the given rows of it, with one copy.

        Returns:
            Where each comes from: the first context of its pass, and its index among the kept.

        Raises:
            UserError: the text goes on without a token that is kept.
        """
        n_rows = len(out) if rows is None else len(rows)
        sources, filled = [], 0
        while filled < n_rows:
            current = self._with_unused_tokens()
            first_context, n_used = self._position
            n = min(n_rows - filled, len(current.kept) - n_used)
            used = torch.arange(n_used, n_used + n)
            write(
                out, slice(filled, filled + n) if rows is None else rows[filled:][:n], current, used
            )
            sources.append(torch.stack([torch.full_like(used, first_context), used], dim=1))
            filled += n
            self._position = first_context, n_used + n
        return torch.cat(sources)

    def _with_unused_tokens(self) -> ForwardPass:
        """The current pass, or the next one with a kept token."""
        if self._current is not None and self._position[1] < len(self._current.kept):
            return self._current
        for _ in range(_MOST_EMPTY_PASSES):
            self._current = self._source.next_pass()
            self._position = self._current.first_context, 0
            if len(self._current.kept):
                return self._current
        raise UserError(
            f"none of the tokens of {_MOST_EMPTY_PASSES} batches of contexts is kept: change "
            "exclude_special_tokens or seqpos_slice"
        )


def write(
    out: Float[Tensor, "rows L d"],
    rows: slice | Int[Tensor, " n"],
    source: ForwardPass,
    used: Int[Tensor, " n"],
) -> None:
    """Copy some of the kept tokens of a pass to rows of `out`."""
    kept = source.kept[used.to(source.kept.device)]
    for i, stream in enumerate(source.streams):
        out[rows, i] = stream[kept.to(stream.device)].to(out.device)
