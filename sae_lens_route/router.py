"""The router: for every token, which block's residual stream goes into the SAE (paper 3.1).

1. Normalise each block's activation over `d`:          n(x_i) = (x_i - mean) / (std + 1e-6)
2. Pool over blocks:                                     v = sum_i n(x_i)                  (Eq. 5)
3. Weigh the blocks:                                     p = softmax(v @ W_router)         (Eq. 6-7)
4. Route:   hard     x_route = p_i* n(x_i*), i* = argmax p                                 (Eq. 8-9)
            soft     x_route = sum_i p_i n(x_i)                                            (Eq. 14)
            uniform  x_route = n(x_i*), i* drawn uniformly (the paper's Random baseline),
                     or with a given share for each layer

`balanced_assignment` is not the paper's: it is the teacher of `router_objective="assignment"`.

Only the mean and the scale of each block are computed in full; the normalised `[..., L, d]` tensor
is never made: sums and selections of `n(x_i)` are taken from `x` directly.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

RoutingMode = Literal["hard", "soft", "uniform"]
Aggregation = Literal["sum", "mean", "attention"]

NORM_EPS = 1e-6
_PIECE = 2**19
"""Numbers that are worked on at a time on the CPU: two megabytes in float32."""


class Routing(NamedTuple):
    """What the router decided for each token, and the activation it made."""

    probs: Float[Tensor, "... L"]
    """Route probabilities p (Eq. 7); 1/L each under uniform routing."""
    layer: Int[Tensor, ...]
    """Index of the routed layer i*, into the routed layers; the most probable one under soft."""
    weight: Float[Tensor, ...]
    """What multiplies the routed layer's n(x): p of that layer, or 1 under uniform routing."""
    x_route: Float[Tensor, "... d"]
    """The routed activation, in normalised units: the SAE's input (Eq. 9, 14)."""
    mean: Float[Tensor, "... L"]
    """Mean over d of every layer's activation."""
    scale: Float[Tensor, "... L"]
    """Unbiased standard deviation over d of every layer's activation, plus 1e-6."""


def normalization_stats(
    x: Float[Tensor, "... d"],
) -> tuple[Float[Tensor, ...], Float[Tensor, ...]]:
    """Mean and scale with `n(x) = (x - mean) / scale`; scale is the unbiased std + 1e-6."""
    if x.device.type == "cpu":  # var_mean is not vectorised there: ten times as slow
        mean = x.mean(dim=-1)
        return mean, _deviation_norm(x, mean) / (x.shape[-1] - 1) ** 0.5 + NORM_EPS
    variance, mean = torch.var_mean(x, dim=-1)
    return mean, variance.sqrt() + NORM_EPS


def _deviation_norm(x: Float[Tensor, "... d"], mean: Float[Tensor, ...]) -> Float[Tensor, ...]:
    """`|x - mean|` over d, in pieces that fit a cache: the difference is as large as x."""
    n_rows = max(1, _PIECE * x.shape[0] // max(1, x.numel()))
    if x.ndim == 1 or len(x) <= n_rows:
        return torch.linalg.vector_norm(x - mean.unsqueeze(-1), dim=-1)
    pieces = zip(x.split(n_rows), mean.split(n_rows), strict=True)
    return torch.cat([torch.linalg.vector_norm(a - b.unsqueeze(-1), dim=-1) for a, b in pieces])


def normalize(x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
    """Each vector with its mean taken off, divided by its unbiased std + 1e-6."""
    mean, scale = normalization_stats(x)
    return (x - mean.unsqueeze(-1)) / scale.unsqueeze(-1)


def pick_layer(x: Float[Tensor, "... L d"], layer: Int[Tensor, ...]) -> Float[Tensor, "... d"]:
    """The activation of one layer per token."""
    index = layer[..., None, None].expand(*layer.shape, 1, x.shape[-1])
    return x.gather(-2, index).squeeze(-2)


def _weighted_sum(
    x: Float[Tensor, "... L d"],
    weights: Float[Tensor, "... L"],
    mean: Float[Tensor, "... L"],
    scale: Float[Tensor, "... L"],
) -> Float[Tensor, "... d"]:
    """`sum_i weights_i n(x_i)` without making n(x)."""
    per_layer = weights / scale
    # einsum would read x with strides: four times as slow on the CPU
    return (per_layer.unsqueeze(-2) @ x).squeeze(-2) - (per_layer * mean).sum(-1, keepdim=True)


def route_probs(
    x: Float[Tensor, "... L d"],
    mean: Float[Tensor, "... L"],
    scale: Float[Tensor, "... L"],
    W_router: Float[Tensor, "d L"],
    aggregation: Aggregation,
    q_router: Float[Tensor, " d"] | None = None,
) -> Float[Tensor, "... L"]:
    """Route probabilities p (Eq. 5-7).

    `attention` (the paper's Table 2 names it and its code has none, so this one is ours and cannot
    be checked against theirs) pools with weights softmax_i(n(x_i) . q / sqrt(d)), times L so that
    its logits have the size of the sum's; q = 0 gives exactly the sum.
    """
    n_layers = x.shape[-2]
    if aggregation == "attention":
        if q_router is None:
            raise ValueError("aggregation='attention' needs the query q_router [d]")
        # q . n(x) = (q . x - mean * sum q) / scale, so n(x) is not needed here either
        dots = (x @ q_router - mean * q_router.sum()) / scale
        pooling = torch.softmax(dots / x.shape[-1] ** 0.5, dim=-1) * n_layers
    else:
        pooling = torch.full_like(mean, 1.0 if aggregation == "sum" else 1.0 / n_layers)
    return torch.softmax(_weighted_sum(x, pooling, mean, scale) @ W_router, dim=-1)


@torch.no_grad()
def balanced_assignment(
    cost: Float[Tensor, "tokens L"], temperature: float, n_iterations: int = 20
) -> Float[Tensor, "tokens L"]:
    """Assign tokens to layers at low cost, so that every layer gets the same load.

    Each row is a distribution over the layers; the columns sum to tokens / L. Among all such
    assignments this one has the least cost minus `temperature` times its entropy (optimal transport
    with entropic regularisation, Sinkhorn's iteration; Cuturi 2013). What a layer costs for every
    token alike, so that shallow layers are easier, does not matter: balancing takes it off again.

    Args:
        cost: of sending each token to each layer.
        temperature: in the units of `cost`; towards 0 each token goes to a single layer.
        n_iterations: of rescaling the columns. Rows are exact, columns nearly.
    """
    scores = -cost / temperature
    offset = torch.zeros_like(scores[0])
    for _ in range(n_iterations):
        load = torch.softmax(scores + offset, dim=-1).mean(0)
        offset = offset - (load * len(offset)).clamp(min=1e-12).log()
    return torch.softmax(scores + offset, dim=-1)


def route(
    x: Float[Tensor, "... L d"],
    W_router: Float[Tensor, "d L"],
    *,
    routing: RoutingMode = "hard",
    aggregation: Aggregation = "sum",
    q_router: Float[Tensor, " d"] | None = None,
    layer_shares: Float[Tensor, " L"] | None = None,
    generator: torch.Generator | None = None,
) -> Routing:
    """Route every token (see the module's numbered steps).

    Args:
        x: Residual streams after the L routed blocks, in order.
        W_router: Router weights, no bias.
        routing: hard, soft or uniform.
        aggregation: how the layers are pooled before the router reads them.
        q_router: the attention query, read only when aggregation is "attention".
        layer_shares: what uniform routing draws layers from instead of the uniform distribution;
            they sum to 1.
        generator: source of the uniform draw, on the device of `x`.
    """
    mean, scale = normalization_stats(x)
    if routing == "uniform":
        n_layers = x.shape[-2]
        if layer_shares is None:
            layer = torch.randint(n_layers, mean.shape[:-1], generator=generator, device=x.device)
            probs = torch.full_like(mean, 1.0 / n_layers)
        else:
            n_tokens = mean.shape[:-1].numel()
            drawn = torch.multinomial(layer_shares, n_tokens, replacement=True, generator=generator)
            layer, probs = drawn.view(mean.shape[:-1]), layer_shares.to(mean).expand(mean.shape)
        weight = torch.ones_like(mean[..., 0])
    else:
        probs = route_probs(x, mean, scale, W_router, aggregation, q_router)
        weight, layer = probs.max(dim=-1)
        if routing == "soft":
            x_route = _weighted_sum(x, probs, mean, scale)
            return Routing(probs, layer, weight, x_route, mean, scale)
    at_layer = layer.unsqueeze(-1)
    chosen_mean, chosen_scale = mean.gather(-1, at_layer), scale.gather(-1, at_layer)
    x_route = (pick_layer(x, layer) - chosen_mean) * (weight.unsqueeze(-1) / chosen_scale)
    return Routing(probs, layer, weight, x_route, mean, scale)
