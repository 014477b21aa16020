"""Where `b_dec` starts: the center of what the SAE reads.

Residual streams have a few directions that are large at every token. An SAE that starts with
`b_dec` at 0, as the paper's code does, spends active features on them at every token: features that
are dense and say nothing. With the center in `b_dec` they are not needed (docs/training.md).
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

BDecInit = Literal["zeros", "mean", "geometric_median"]


@torch.no_grad()
def initialize_b_dec(b_dec: Float[Tensor, " d"], how: BDecInit, x: Float[Tensor, "n d"]) -> None:
    """Set `b_dec` in place before the first step.

    Args:
        b_dec: The decoder's bias.
        how: "zeros" leaves it as it is.
        x: What the SAE reads in the first batch.
    """
    if how == "mean":
        b_dec.copy_(x.mean(0))
    elif how == "geometric_median":
        b_dec.copy_(geometric_median(x))


def geometric_median(x: Float[Tensor, "n d"], n_iterations: int = 50) -> Float[Tensor, " d"]:
    """The point with the least mean distance to the rows of `x` (Weiszfeld's iteration)."""
    center = x.mean(0)
    for _ in range(n_iterations):
        closeness = 1 / (x - center).norm(dim=-1, keepdim=True).clamp(min=1e-8)
        center = (x * closeness).sum(0) / closeness.sum()
    return center
