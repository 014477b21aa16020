"""How well a RouteSAE reconstructs, and how well its router chooses, on held-out tokens.

`reconstruction_metrics` needs activations only. Its centre is one table per batch: the error of
every token at every routed layer, had the token been sent there with the weight it was given. The
routed error, the random router's, every fixed layer's and the best possible choice are all read
off that table, so they compare the same dictionary on the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_route.router import Routing, normalize


class ReconstructionMetrics(NamedTuple):
    """Means over tokens. Everything is in normalised units, so scales of layers do not count."""

    n_tokens: int
    """Tokens evaluated."""
    norm_mse: float
    """||x_route - x_hat||^2 / ||x_route||^2 under the trained routing."""
    explained_variance: float
    """1 - sum ||x_route - x_hat||^2 / sum ||x_route - mean||^2, as SAELens defines it."""
    l0: float
    """Active features per token."""
    dead_features: int
    """Features that no evaluated token activated."""
    share: list[float]
    """Share of the tokens sent to each routed layer."""
    mean_probs: list[float]
    """Mean route probability of each routed layer."""
    load_entropy: float
    """Entropy of `share` in nats; ln L when every layer is used alike."""
    route_weight: float
    """Mean weight of the chosen layer (its probability; 1 under uniform routing)."""
    margin: float
    """Mean difference of the two largest route probabilities."""
    norm_mse_by_layer: list[float | None]
    """NormMSE of the tokens sent to each layer; null where none was."""
    norm_mse_fixed_layer: list[float]
    """NormMSE had every token been sent to that one layer."""
    norm_mse_uniform: float
    """NormMSE had layers been drawn uniformly for each token: the mean of the fixed layers'."""
    norm_mse_matched: float
    """NormMSE of a random router with this one's share per layer."""
    norm_mse_best: float
    """NormMSE had each token been sent to the layer where its error is least."""
    regret: float | None
    """norm_mse - norm_mse_best; null under soft routing, which has no single layer."""


class _Sums:
    """Running sums on the device, read off it once at the end."""

    def __init__(self, n_layers: int, d_in: int, d_sae: int, device: torch.device) -> None:
        like = {"dtype": torch.float64, "device": device}
        self.n = 0
        self.error = torch.zeros((), **like)
        self.squared_error = torch.zeros((), **like)
        self.x = torch.zeros(d_in, **like)
        self.x_squared = torch.zeros((), **like)
        self.fired = torch.zeros(d_sae, **like)
        self.tokens = torch.zeros(n_layers, **like)
        self.probs = torch.zeros(n_layers, **like)
        self.weight = torch.zeros((), **like)
        self.margin = torch.zeros((), **like)
        self.routed_error = torch.zeros(n_layers, **like)
        self.layer_error = torch.zeros(n_layers, **like)
        self.best_error = torch.zeros((), **like)


def token_error(x: Float[Tensor, "... d"], x_hat: Float[Tensor, "... d"]) -> Float[Tensor, ...]:
    """NormMSE of each token: squared error over the target's squared norm."""
    return (x - x_hat).pow(2).sum(-1) / x.pow(2).sum(-1)


def layer_errors(
    sae: Any, x: Float[Tensor, "tokens L d"], routing: Routing
) -> Float[Tensor, "tokens L"]:
    """NormMSE of every token at every layer, each given the weight of the layer it was sent to.

    One weight for all layers, because the dictionary was trained on routed activations: at another
    layer's own small probability its biases alone would decide the error.
    """
    weight = routing.weight.unsqueeze(-1)
    errors = []
    for i in range(x.shape[-2]):
        x_i = weight * normalize(x[..., i, :].to(routing.x_route.dtype))
        errors.append(token_error(x_i, sae.decode(sae.encode(x_i))))
    return torch.stack(errors, dim=-1)


@torch.no_grad()
def reconstruction_metrics(
    sae: Any, batches: Iterable[Float[Tensor, "tokens L d"]]
) -> ReconstructionMetrics:
    """Reconstruction and routing metrics of a RouteSAE over batches of activations.

    Args:
        sae: A RouteSAE, for inference or training.
        batches: Residual streams after the routed blocks; excluded tokens are already left out.

    Raises:
        ValueError: there were no tokens.
    """
    cfg = sae.cfg
    sums = _Sums(cfg.n_routed_layers, cfg.d_in, cfg.d_sae, sae.W_dec.device)
    for x in batches:
        _add(sums, sae, x.to(sae.W_dec.device))
    if sums.n == 0:
        raise ValueError("no tokens to evaluate: the dataset gave none that are not excluded")
    return _metrics(sums, has_single_layer=cfg.routing != "soft")


def _add(sums: _Sums, sae: Any, x: Float[Tensor, "tokens L d"]) -> None:
    routing = sae.route(x)
    feature_acts = sae.encode(routing.x_route)
    x_hat = sae.decode(feature_acts)
    errors = layer_errors(sae, x, routing)
    error = token_error(routing.x_route, x_hat)
    chosen = torch.nn.functional.one_hot(routing.layer, x.shape[-2]).to(torch.float64)
    top = routing.probs.topk(min(2, x.shape[-2]), dim=-1).values
    sums.n += len(x)
    sums.error += error.sum()
    sums.squared_error += (routing.x_route - x_hat).pow(2).sum()
    sums.x += routing.x_route.sum(0)
    sums.x_squared += routing.x_route.pow(2).sum()
    sums.fired += (feature_acts != 0).sum(0)
    sums.tokens += chosen.sum(0)
    sums.probs += routing.probs.sum(0)
    sums.weight += routing.weight.sum()
    sums.margin += (top[..., 0] - top[..., -1]).sum()
    sums.routed_error += (chosen * error.unsqueeze(-1)).sum(0)
    sums.layer_error += errors.sum(0)
    sums.best_error += errors.min(-1).values.sum()


def _metrics(sums: _Sums, has_single_layer: bool) -> ReconstructionMetrics:
    n = sums.n
    share = sums.tokens / n
    fixed = sums.layer_error / n
    norm_mse = float(sums.error / n)
    best = float(sums.best_error / n)
    variance = sums.x_squared - sums.x.pow(2).sum() / n
    by_layer = [
        float(e / t) if t > 0 else None for e, t in zip(sums.routed_error, sums.tokens, strict=True)
    ]
    return ReconstructionMetrics(
        n_tokens=n,
        norm_mse=norm_mse,
        explained_variance=float(1 - sums.squared_error / variance),
        l0=float(sums.fired.sum() / n),
        dead_features=int((sums.fired == 0).sum()),
        share=share.tolist(),
        mean_probs=(sums.probs / n).tolist(),
        load_entropy=float(torch.special.entr(share).sum()),
        route_weight=float(sums.weight / n),
        margin=float(sums.margin / n),
        norm_mse_by_layer=by_layer,
        norm_mse_fixed_layer=fixed.tolist(),
        norm_mse_uniform=float(fixed.mean()),
        norm_mse_matched=float((share * fixed).sum()),
        norm_mse_best=best,
        regret=norm_mse - best if has_single_layer else None,
    )
