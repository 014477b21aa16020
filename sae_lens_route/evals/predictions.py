"""The model's predictions with residual streams edited, compared with its clean ones.

Logits are the largest tensors of an evaluation: 8 contexts of 256 tokens over 49,152 words take 400
MB in float32. The clean model's are kept for a batch, whatever is compared with them. The other
passes' logits are compared a few positions at a time, so that what is computed from them stays in
the CPU's cache and is never as large as the logits. Blocks before the first edit do not run again:
their outputs are those of the clean model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lens_route.models.kinds import (
    LanguageModel,
    decoder_blocks,
    residual_of,
    with_residual,
)

Edit = Callable[[Float[Tensor, "batch pos d"]], Float[Tensor, "batch pos d"]]
"""The residual stream after a block -> what takes its place."""

_PIECE = 2**19
"""Log probabilities processed at a time on the CPU: two megabytes in float32."""
_PIECE_ON_GPU = 2**26


class Comparison(NamedTuple):
    """Predictions of an edited model, at every position, in nats and float64."""

    kl: Float[Tensor, "batch pos"]
    """KL divergence of its next-token distribution from the clean model's."""
    ce: Float[Tensor, "batch targets"]
    """Cross-entropy of the next token, where there is one."""


class CleanPass:
    """The unedited model on one batch of contexts, with which edited ones are compared.

    Nothing here takes gradients.
    """

    @torch.no_grad()
    def __init__(self, model: LanguageModel, tokens: Int[Tensor, "batch pos"]) -> None:
        self.model, self.tokens = model, tokens
        logits = model(tokens, return_type="logits").flatten(0, 1)
        # at the last position of a context any word will do: it is left out
        self._next = tokens.roll(-1, dims=1).flatten().unsqueeze(-1).to(logits.device)
        self._logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        self._log_sum = torch.cat(
            [_shifted(piece)[1] for piece in self._logits.split(self._n_positions)]
        )
        self.ce = self._per_target(self._log_sum - self._logits.gather(-1, self._next))
        self._ablated: list[tuple[list[int], Tensor, Comparison]] = []
        self._outputs: dict[int, Any] = {}

    @torch.no_grad()
    def edited(
        self, edits: Mapping[int, Edit]
    ) -> tuple[Comparison, dict[int, Float[Tensor, "batch pos d"]]]:
        """Run the model again with the stream edited after some blocks.

        Returns:
            The comparison of its predictions, and the edited stream after each of these blocks.
        """
        with _edits(self.model, edits, self._outputs) as streams:
            logits = self.model(self.tokens, return_type="logits")
        return self._compared(logits.flatten(0, 1)), streams

    def ablated(self, blocks: list[int], where: Bool[Tensor, "batch pos L"]) -> Comparison:
        """The same with the stream after each block set to zero at the given tokens.

        Computed once for both splices of an SAE, and for all SAEs that write to the same places.
        """
        for known_blocks, known, comparison in self._ablated:
            if known_blocks == blocks and torch.equal(known, where):
                return comparison

        def zeroed(here: Bool[Tensor, "batch pos"], x: Float[Tensor, "batch pos d"]) -> Tensor:
            return x.masked_fill(here.unsqueeze(-1).to(x.device), 0)

        places = zip(blocks, where.unbind(-1), strict=True)
        comparison, _ = self.edited({block: partial(zeroed, here) for block, here in places})
        self._ablated.append((blocks, where, comparison))
        return comparison

    @property
    def _n_positions(self) -> int:
        size = _PIECE if self._logits.device.type == "cpu" else _PIECE_ON_GPU
        return max(1, size // self._logits.shape[-1])

    def _compared(self, logits: Float[Tensor, "n vocab"]) -> Comparison:
        kl, ce = [], []
        tensors = (self._logits, self._log_sum, logits, self._next)
        pieces = (tensor.split(self._n_positions) for tensor in tensors)
        for clean, clean_log_sum, piece, following in zip(*pieces, strict=True):
            other, log_sum = _shifted(piece.to(clean.dtype))
            probs = (clean - clean_log_sum.to(clean.dtype)).exp()
            # exactly 0 for equal logits
            mean_difference = (probs * (clean - other)).sum(-1, keepdim=True)
            kl.append(mean_difference + (log_sum - clean_log_sum))
            ce.append(log_sum - other.gather(-1, following))
        per_position = torch.cat(kl).view_as(self.tokens).double()
        return Comparison(per_position, self._per_target(torch.cat(ce)))

    def _per_target(self, values: Float[Tensor, "n 1"]) -> Float[Tensor, "batch targets"]:
        return values.view_as(self.tokens)[:, :-1].double()


def _shifted(
    logits: Float[Tensor, "n vocab"],
) -> tuple[Float[Tensor, "n vocab"], Float[Tensor, "n 1"]]:
    """Logits with a maximum of 0, in place, and the log of the sum of their exponentials.

    In float64, because a difference of two such logs is the smallest part of a small divergence.
    """
    logits -= logits.amax(-1, keepdim=True)
    return logits, logits.exp().sum(-1, keepdim=True).double().log()


@contextmanager
def _edits(
    model: LanguageModel, edits: Mapping[int, Edit], outputs: dict[int, Any]
) -> Iterator[dict[int, Tensor]]:
    """Edit the residual stream after some blocks; yields the latest edited streams by block.

    Args:
        model: The model.
        edits: By block.
        outputs: What blocks return in the clean model, by block. The first one with an edit is
            added; where it is known, the blocks up to it are not run.
    """
    modules, first = decoder_blocks(model), min(edits)
    streams: dict[int, Tensor] = {}

    def edit(block: int, _module: Any, _args: Any, output: Any) -> Any:
        if block == first:
            outputs[block] = output
        streams[block] = edits[block](residual_of(output))
        return with_residual(output, streams[block])

    def unchanged(*args: Any, **kwargs: Any) -> Any:
        return with_residual(outputs[first], args[0] if args else kwargs["hidden_states"])

    handles = [modules[block].register_forward_hook(partial(edit, block)) for block in edits]
    skipped = [vars(module) for module in modules[: first + 1]] if first in outputs else []
    own = [attributes.get("forward") for attributes in skipped]  # as accelerate sets it
    try:
        for attributes in skipped:
            attributes["forward"] = unchanged
        if skipped:
            skipped[-1]["forward"] = lambda *_args, **_kwargs: outputs[first]
        yield streams
    finally:
        for attributes, forward in zip(skipped, own, strict=True):
            attributes["forward"] = forward
            if forward is None:
                del attributes["forward"]
        for handle in handles:
            handle.remove()
