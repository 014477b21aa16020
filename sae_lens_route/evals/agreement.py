"""Whether two dictionaries of the same streams have the same features, as two seeds should."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_lens_route.errors import UserError


class DecoderAgreement(NamedTuple):
    """Features of one dictionary with a twin in another. Not symmetric."""

    n_features: int
    """Features of the first dictionary that were compared."""
    twin_share: float
    """Share of them whose decoder row has a cosine of at least the threshold with some row of the
    other dictionary."""
    mean_cosine: float
    """Mean over features of the largest cosine."""


@torch.no_grad()
def decoder_agreement(
    sae: Any,
    other: Any,
    *,
    alive: Bool[Tensor, " d_sae"] | None = None,
    other_alive: Bool[Tensor, " d_sae_of_other"] | None = None,
    threshold: float = 0.7,
) -> DecoderAgreement:
    """Share of the features of `sae` that have a twin in `other`, by the cosine of decoder rows.

    The rows of a crosscoder are those of all its blocks, concatenated.

    Args:
        sae: The SAE whose features are compared.
        other: An SAE of the same streams, such as one with another seed.
        alive: Features of `sae` to compare; None compares all.
        other_alive: Features of `other` that can be twins; None takes all.
        threshold: The least cosine of twins.

    Raises:
        UserError: The decoders write to spaces of different widths, or no feature is left.
    """
    if sae.W_dec.shape[1] != other.W_dec.shape[1]:
        raise UserError(
            f"decoders of widths {sae.W_dec.shape[1]} and {other.W_dec.shape[1]} cannot be "
            "compared; both SAEs must read the same streams"
        )
    cosines = largest_cosines(_rows(sae.W_dec, alive), _rows(other.W_dec, other_alive))
    return DecoderAgreement(
        len(cosines), float((cosines >= threshold).double().mean()), float(cosines.mean())
    )


def largest_cosines(
    rows: Float[Tensor, "n d"], others: Float[Tensor, "m d"], chunk: int = 1024
) -> Float[Tensor, " n"]:
    """Largest cosine of each row with any other row, a chunk of rows at a time."""
    rows, others = (torch.nn.functional.normalize(part, dim=-1) for part in (rows, others))
    return torch.cat([(part @ others.T).amax(-1) for part in rows.split(chunk)])


def _rows(
    W_dec: Float[Tensor, "d_sae d"], alive: Bool[Tensor, " d_sae"] | None
) -> Float[Tensor, "n d"]:
    rows = W_dec if alive is None else W_dec[alive.to(W_dec.device)]
    if not len(rows):
        raise UserError("no feature to compare: all are marked as dead")
    return rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
