"""Text through the language model: one iterator for evaluation, features, pages and reproduction.

`activation_batches` yields the residual streams that one or more SAEs read, and which tokens are
kept. Text is tokenized, packed and excluded as the metadata of the SAEs says they were trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from sae_lens.config import HfDataset
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_route.data.activations import RoutedActivationsStore, residual_streams
from sae_lens_route.data.kept_tokens import KeptTokens
from sae_lens_route.errors import UserError
from sae_lens_route.models.kinds import LanguageModel, model_device
from sae_lens_route.saes.metadata import routed_blocks, source_hook_names
from sae_lens_route.saes.router import streams_at

Text = str | HfDataset | Int[Tensor, "n pos"]
"""A dataset, a path for `load_text_dataset`, or token ids with one context per row."""

_READING_FIELDS = (
    "context_size",
    "prepend_bos",
    "exclude_special_tokens",
    "seqpos_slice",
    "disable_concat_sequences",
    "sequence_separator_token",
)
"""Metadata that decides how text becomes contexts and which tokens are kept."""


class ActivationBatch(NamedTuple):
    """Consecutive contexts of a text, with the residual streams of all blocks that are read."""

    tokens: Int[Tensor, "batch pos"]
    """Token ids, one context per row, on the model's device."""
    activations: Float[Tensor, "batch pos L d"]
    """Residual streams after the blocks, at every position, on the model's device."""
    kept: Bool[Tensor, "batch pos"]
    """False where a token is excluded, by its id or its position."""
    blocks: tuple[int, ...]
    """The L blocks, ascending."""

    def of(self, sae: Any) -> Float[Tensor, "batch pos L d"]:
        """The streams that one of the SAEs reads, in the order of its routes, on its device."""
        routes = [self.blocks.index(block) for block in routed_blocks(sae)]
        return streams_at(self.activations, routes).to(sae.W_dec.device)


def activation_batches(
    model: LanguageModel,
    saes: Any | Sequence[Any],
    text: Text,
    *,
    max_tokens: int = 50_000,
    batch_size: int = 8,
    description: str | None = None,
) -> Iterator[ActivationBatch]:
    """Read text as SAEs were trained to, one forward pass per batch up to the last block read.

    Args:
        model: The model the SAEs were trained on.
        saes: One or several, with their metadata. All must read text in the same way.
        text: What to read. Padding of given token ids belongs on the right.
        max_tokens: Tokens to read, excluded ones included; at least one context is read, and given
            token ids are read whole.
        batch_size: Contexts in one forward pass.
        description: Of the progress bar; None shows none.

    Raises:
        UserError: the SAEs read text differently, or the text is empty.
    """
    saes = list(saes) if isinstance(saes, Sequence) else [saes]
    _require_same_reading(saes)
    kept = KeptTokens.of(saes[0], getattr(model, "tokenizer", None))
    if isinstance(text, Tensor):
        batches, n_contexts = iter(text.split(batch_size)), len(text)
    else:
        store = RoutedActivationsStore.from_sae(
            model, saes[0], text, store_batch_size_prompts=batch_size
        )
        batches, n_contexts = store.token_batches(max_tokens), max_tokens // store.context_size
    n_batches = math.ceil(max(1, n_contexts) / batch_size)
    progress = tqdm(batches, description, n_batches, unit="batch", disable=description is None)
    return _read(model, iter(progress), kept, _hooks_by_block(saes))


def _read(
    model: LanguageModel,
    token_batches: Iterable[Int[Tensor, "batch pos"]],
    kept: KeptTokens,
    hook_by_block: dict[int, str],
) -> Iterator[ActivationBatch]:
    device = model_device(model)
    for tokens in token_batches:
        tokens = tokens.to(device)
        streams = residual_streams(model, tokens, list(hook_by_block.values()))
        stacked = torch.stack([stream.to(device) for stream in streams], dim=2)
        yield ActivationBatch(tokens, stacked, kept.mask(tokens), tuple(hook_by_block))


def kept_activations(
    batches: Iterable[ActivationBatch], sae: Any
) -> Iterator[Float[Tensor, "n L d"]]:
    """The residual streams of the kept tokens of each batch, as one of its SAEs reads them."""
    for batch in batches:
        yield batch.of(sae)[batch.kept.to(sae.W_dec.device)]


def _hooks_by_block(saes: Sequence[Any]) -> dict[int, str]:
    """Source hooks of all the SAEs by block, ascending."""
    names: dict[int, str] = {}
    for sae in saes:
        names.update(zip(routed_blocks(sae), source_hook_names(sae), strict=True))
    return dict(sorted(names.items()))


def _require_same_reading(saes: Sequence[Any]) -> None:
    if not saes:
        raise UserError("saes=[]: at least one SAE is needed")
    for field in _READING_FIELDS:
        # a list in the configuration is a list or a tuple in a loaded one: compare as written
        values = {str(_plain(getattr(sae.cfg.metadata, field))) for sae in saes}
        if len(values) > 1:
            raise UserError(
                f"the SAEs read text differently: {field} is {' or '.join(sorted(values))}; "
                "read it for each group on its own"
            )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
