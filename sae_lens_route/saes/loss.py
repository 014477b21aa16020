"""Reconstruction errors: NormMSE (Eq. 12 as the paper's code computes it) and plain MSE."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

LossName = Literal["normalized_mse", "mse"]

NEGLIGIBLE = 1e-12
"""Squared norms up to this one count as 0. A routed activation's is about p² d, so it only gets
there if its stream is constant over d: with a standard deviation below about 1e-12."""


def mse(preds: Float[Tensor, "... d"], target: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
    """Squared error of each coordinate."""
    return (preds - target).pow(2)


def normalized_mse(
    preds: Float[Tensor, "... d"], target: Float[Tensor, "... d"]
) -> Float[Tensor, "... d"]:
    """Squared error of each coordinate over the target's squared norm; sums over d to NormMSE.

    The target is not detached: it is the router's output, and the router learns through it. A
    negligible target, of a stream that is constant over d, has an error of 0 and no gradient.
    """
    return mse(preds, target) / divisor(target.pow(2).sum(dim=-1, keepdim=True))


def norm_mse(preds: Float[Tensor, "... d"], target: Float[Tensor, "... d"]) -> Float[Tensor, ...]:
    """NormMSE of each token: `||preds - target||² / ||target||²`."""
    return normalized_mse(preds, target).sum(dim=-1)


def divisor(size: Float[Tensor, ...]) -> Float[Tensor, ...]:
    """`size`, or inf where it is negligible: a finite number over it is then 0, as is its gradient.

    NaN becomes inf too; what it was computed from is NaN as well, and so remains visible.
    """
    return torch.where(size > NEGLIGIBLE, size, torch.inf)
