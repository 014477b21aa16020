"""`router_objective="assignment"`: the router learns where each token is reconstructed best.

Not the paper's, whose objective reaches the router only through p and teaches it next to nothing
(docs/routing.md).

1. Encode one token in four of the batch at every routed block, without gradients: a table of
   errors, tokens by blocks.
2. Assign these tokens to blocks at the least total error under equal loads (`balanced_assignment`).
   A cost shared by all tokens of a block, such as deep blocks being harder, has no effect:
   balancing cancels it.
3. The router predicts the assignment by cross entropy. Only the router learns from it: dictionary
   and router alternate, as in k-means.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_route.saes.loss import divisor

TEMPERATURE = 0.2
"""Of the assignment that the router learns, in units of the mean error."""

COMPARED = 4
"""One token in this many is encoded at every routed block."""


def assignment_loss(
    errors: Float[Tensor, "tokens L"], probs: Float[Tensor, "tokens L"]
) -> Float[Tensor, ""]:
    """Cross entropy, in nats, of the route probabilities against the balanced assignment."""
    target = balanced_assignment(errors / divisor(errors.mean()), TEMPERATURE)
    return -(target * probs.clamp(min=1e-12).log()).sum(-1).mean()


@torch.no_grad()
def balanced_assignment(
    cost: Float[Tensor, "tokens L"], temperature: float, n_iterations: int = 20
) -> Float[Tensor, "tokens L"]:
    """Assign tokens to blocks at low cost, so that every block gets the same load.

    Each row is a distribution over the blocks; the columns sum to tokens / L. Among all such
    assignments this one has the least cost minus `temperature` times its entropy (optimal transport
    with entropic regularization, Sinkhorn's iteration; Cuturi 2013).

    Args:
        cost: of sending each token to each block.
        temperature: in the units of `cost`; towards 0 each token goes to a single block.
        n_iterations: of rescaling the columns. Rows are exact, columns nearly.
    """
    scores = -cost / temperature
    offset = torch.zeros_like(scores[0])
    for _ in range(n_iterations):
        load = torch.softmax(scores + offset, dim=-1).mean(0)
        offset = offset - (load * len(offset)).clamp(min=1e-12).log()
    return torch.softmax(scores + offset, dim=-1)
