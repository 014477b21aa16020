"""The router: which block's residual stream goes into the SAE, for every token (paper 3.1).

1. Normalize each stream over `d`:          n(x_i) = (x_i - mean) / (std + 1e-6)
2. Pool over streams:                       v = sum_i n(x_i)                               (Eq. 5)
3. Route probabilities:                     p = softmax(v @ W_router)                    (Eq. 6-7)
4. Route:   hard     x_route = p_i* n(x_i*), i* = argmax p                               (Eq. 8-9)
                     (n(x_i*) alone without `scale_by_probability`)
            soft     x_route = sum_i p_i n(x_i)                                           (Eq. 14)
            uniform  x_route = n(x_i*), i* drawn uniformly (the paper's Random baseline),
                     or with a given share for each route

Only the mean and the scale of each stream are computed in full. The normalized `[..., L, d]` tensor
is never built: sums and selections of `n(x_i)` are taken from `x` directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lens_route.errors import UserError

RoutingMode = Literal["hard", "soft", "uniform"]
Aggregation = Literal["sum", "mean", "attention"]

NORM_EPS = 1e-6
_PIECE = 2**19
"""Numbers processed at a time on the CPU: two megabytes in float32."""


class Routing(NamedTuple):
    """The router's decision for each token, and the routed activation."""

    probs: Float[Tensor, "... L"]
    """Route probabilities p (Eq. 7); 1/L each under uniform routing."""
    route: Int[Tensor, ...]
    """The chosen route i*, a position among the routed blocks; the most probable under soft."""
    weight: Float[Tensor, ...]
    """Factor of the chosen stream's n(x): p of that route, or 1 where p does not scale."""
    x_route: Float[Tensor, "... d"]
    """The routed activation, in normalized units: the SAE's input (Eq. 9, 14)."""
    mean: Float[Tensor, "... L"]
    """Mean over d of every stream."""
    scale: Float[Tensor, "... L"]
    """Unbiased standard deviation over d of every stream, plus 1e-6."""

    @property
    def layer(self) -> Int[Tensor, ...]:
        """Alias of `route`."""
        return self.route

    def of(self, tokens: slice | Bool[Tensor, ...]) -> Routing:
        """The decision for some of the tokens, along the first axes."""
        return Routing(*(part[tokens] for part in self))


def normalization_stats(
    x: Float[Tensor, "... d"],
) -> tuple[Float[Tensor, ...], Float[Tensor, ...]]:
    """Mean and scale with `n(x) = (x - mean) / scale`; scale is the unbiased std + 1e-6."""
    if x.device.type == "cpu":  # var_mean is not vectorized there: ten times as slow
        mean = x.mean(dim=-1)
        return mean, _deviation_norm(x, mean) / (x.shape[-1] - 1) ** 0.5 + NORM_EPS
    variance, mean = torch.var_mean(x, dim=-1)
    return mean, root(variance) + NORM_EPS


def root(x: Float[Tensor, ...]) -> Float[Tensor, ...]:
    """Square root whose gradient at 0 is 0, as that of a norm is, and not infinite."""
    is_zero = x == 0
    return torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, x).sqrt())


def _deviation_norm(x: Float[Tensor, "... d"], mean: Float[Tensor, ...]) -> Float[Tensor, ...]:
    """`|x - mean|` over d, in pieces that fit the CPU's cache: the difference is as large as x."""
    n_rows = max(1, _PIECE * x.shape[0] // max(1, x.numel()))
    if x.ndim == 1 or len(x) <= n_rows:
        return torch.linalg.vector_norm(x - mean.unsqueeze(-1), dim=-1)
    pieces = zip(x.split(n_rows), mean.split(n_rows), strict=True)
    return torch.cat([torch.linalg.vector_norm(a - b.unsqueeze(-1), dim=-1) for a, b in pieces])


def normalize(x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
    """Each vector with its mean subtracted, divided by its unbiased std + 1e-6."""
    mean, scale = normalization_stats(x)
    return (x - mean.unsqueeze(-1)) / scale.unsqueeze(-1)


def streams_at(x: Float[Tensor, "... L d"], routes: Sequence[int]) -> Float[Tensor, "... R d"]:
    """The streams of some routes, which ascend; a view if they are neighbors."""
    if are_neighbors(routes):
        return x[..., routes[0] : routes[-1] + 1, :]
    return x[..., list(routes), :]


def are_neighbors(routes: Sequence[int]) -> bool:
    """Whether routes, which ascend, follow one another."""
    return routes[-1] - routes[0] + 1 == len(routes)


def pick_route(x: Float[Tensor, "... L d"], route: Int[Tensor, ...]) -> Float[Tensor, "... d"]:
    """The stream of one route per token."""
    index = route[..., None, None].expand(*route.shape, 1, x.shape[-1])
    return x.gather(-2, index).squeeze(-2)


def _weighted_sum(
    x: Float[Tensor, "... L d"],
    weights: Float[Tensor, "... L"],
    mean: Float[Tensor, "... L"],
    scale: Float[Tensor, "... L"],
) -> Float[Tensor, "... d"]:
    """`sum_i weights_i n(x_i)` without building n(x)."""
    per_route = weights / scale
    # einsum would read x with strides: four times as slow on the CPU
    return (per_route.unsqueeze(-2) @ x).squeeze(-2) - (per_route * mean).sum(-1, keepdim=True)


def route_probs(
    x: Float[Tensor, "... L d"],
    mean: Float[Tensor, "... L"],
    scale: Float[Tensor, "... L"],
    W_router: Float[Tensor, "d L"],
    aggregation: Aggregation,
    q_router: Float[Tensor, " d"] | None = None,
) -> Float[Tensor, "... L"]:
    """Route probabilities p (Eq. 5-7).

    `attention` is named in the paper's Table 2 but missing from its code, so this definition cannot
    be checked against theirs: it pools with weights softmax_i(n(x_i) . q / sqrt(d)), times L so
    that its logits have the size of the sum's; q = 0 is exactly the sum.
    """
    n_routes = x.shape[-2]
    if aggregation == "attention":
        if q_router is None:
            raise UserError("aggregation='attention' needs the query q_router [d]")
        # q . n(x) = (q . x - mean * sum q) / scale, so n(x) is not needed here either
        dots = (x @ q_router - mean * q_router.sum()) / scale
        pooling = torch.softmax(dots / x.shape[-1] ** 0.5, dim=-1) * n_routes
    else:
        pooling = torch.full_like(mean, 1.0 if aggregation == "sum" else 1.0 / n_routes)
    return torch.softmax(_weighted_sum(x, pooling, mean, scale) @ W_router, dim=-1)


def draw_routes(
    shape: torch.Size,
    n_routes: int,
    route_shares: Float[Tensor, " L"] | None,
    generator: torch.Generator | None,
    device: torch.device,
) -> Int[Tensor, ...]:
    """A route for each token, drawn uniformly or with the given shares, on the given device."""
    if route_shares is None:
        return torch.randint(n_routes, shape, generator=generator, device=device)
    n_tokens = shape.numel()
    drawn = torch.multinomial(route_shares, n_tokens, replacement=True, generator=generator)
    return drawn.view(shape)


def route(
    x: Float[Tensor, "... L d"],
    W_router: Float[Tensor, "d L"],
    *,
    routing: RoutingMode = "hard",
    aggregation: Aggregation = "sum",
    scale_by_probability: bool = True,
    q_router: Float[Tensor, " d"] | None = None,
    route_shares: Float[Tensor, " L"] | None = None,
    generator: torch.Generator | None = None,
    drawn: Int[Tensor, ...] | None = None,
) -> Routing:
    """Route every token (see the module's numbered steps).

    Args:
        x: Residual streams after the L routed blocks, in order.
        W_router: Router weights, no bias.
        routing: hard, soft or uniform.
        aggregation: how the streams are pooled before the router reads them.
        scale_by_probability: whether hard routing scales the chosen stream by its probability.
        q_router: the attention query, read only when aggregation is "attention".
        route_shares: distribution that uniform routing draws routes from; None means equal shares.
        generator: source of the uniform draw, on the device of `x`.
        drawn: routes for uniform routing, instead of a new draw.
    """
    mean, scale = normalization_stats(x)
    if routing == "uniform":
        n_routes = x.shape[-2]
        if drawn is None:
            drawn = draw_routes(mean.shape[:-1], n_routes, route_shares, generator, x.device)
        if route_shares is None:
            probs = torch.full_like(mean, 1.0 / n_routes)
        else:
            probs = route_shares.to(mean).expand(mean.shape)
        chosen, weight = drawn, torch.ones_like(mean[..., 0])
    else:
        probs = route_probs(x, mean, scale, W_router, aggregation, q_router)
        weight, chosen = probs.max(dim=-1)
        if routing == "soft":
            x_route = _weighted_sum(x, probs, mean, scale)
            return Routing(probs, chosen, weight, x_route, mean, scale)
        if not scale_by_probability:
            weight = torch.ones_like(weight)
    at = chosen.unsqueeze(-1)
    chosen_mean, chosen_scale = mean.gather(-1, at), scale.gather(-1, at)
    x_route = (pick_route(x, chosen) - chosen_mean) * (weight.unsqueeze(-1) / chosen_scale)
    return Routing(probs, chosen, weight, x_route, mean, scale)
