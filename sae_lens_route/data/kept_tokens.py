"""Which tokens take part: one rule for training, evaluation, features, pages and steering.

A token is *excluded* if its id is among `exclude_special_tokens` or its position lies outside
`seqpos_slice`, two fields of the training configuration that travel in an SAE's metadata. Every
other token is *kept*.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from sae_lens.util import get_special_token_ids
from torch import Tensor

from sae_lens_route.errors import UserError


def excluded_token_ids(
    exclude_special_tokens: bool | Sequence[int] | None, tokenizer: Any
) -> list[int]:
    """Token ids that `exclude_special_tokens` names; True means BOS, EOS, padding and the like.

    Raises:
        UserError: True, but there is no tokenizer to ask.
    """
    if exclude_special_tokens is True:
        if tokenizer is None:
            raise UserError(
                "exclude_special_tokens=True: the model has no tokenizer that names its special "
                "tokens; set a list of token ids, or False"
            )
        return sorted(get_special_token_ids(tokenizer))
    return sorted(exclude_special_tokens or ())


class KeptTokens(NamedTuple):
    """The rule that says which tokens are kept."""

    excluded_ids: tuple[int, ...] = ()
    """Token ids that are excluded wherever they occur."""
    seqpos_slice: tuple[int | None, ...] = (None,)
    """Positions in a context that are kept, as the arguments of `slice`."""

    @classmethod
    def of(cls, sae: Any, tokenizer: Any) -> KeptTokens:
        """The tokens that an SAE was trained on, from its metadata.

        Raises:
            UserError: special tokens are excluded, but there is no tokenizer to ask.
        """
        metadata = sae.cfg.metadata
        excluded = excluded_token_ids(metadata.exclude_special_tokens, tokenizer)
        seqpos_slice = tuple(metadata.seqpos_slice or (None,))
        if n := metadata.context_size:  # a text may be longer: count from the start of a context
            bounds = [i + n if i is not None and i < 0 else i for i in seqpos_slice[:2]]
            seqpos_slice = (*bounds, *seqpos_slice[2:])
        return cls(tuple(excluded), seqpos_slice)

    def mask(
        self, tokens: Int[Tensor, "batch pos"], first_position: int = 0
    ) -> Bool[Tensor, "batch pos"]:
        """True where a token is kept.

        Args:
            tokens: Token ids, one context per row.
            first_position: Position of the first column in its context; above 0 for the new tokens
                of a generation with a key-value cache.
        """
        excluded = torch.tensor(self.excluded_ids, dtype=tokens.dtype, device=tokens.device)
        kept = torch.isin(tokens, excluded, invert=True)
        end = first_position + tokens.shape[1]
        positions = torch.zeros(end, dtype=torch.bool, device=tokens.device)
        positions[slice(*self.seqpos_slice)] = True
        return kept & positions[first_position:]
