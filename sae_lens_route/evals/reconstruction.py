"""How well an SAE reconstructs, and how well its router chooses, from activations alone.

For one token in four there is a table: its error at every routed block, had it been sent there with
the weight it was given. The error at any fixed block, under a random router and under the best
possible choice come from that table, so they compare the same dictionary on the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from sae_lens_route.errors import UserError
from sae_lens_route.saes.crosscoder import CrosscoderSAEMixin
from sae_lens_route.saes.kinds import is_soft
from sae_lens_route.saes.loss import norm_mse
from sae_lens_route.saes.metadata import routed_blocks
from sae_lens_route.saes.reconstruct import reconstruct_and_count
from sae_lens_route.saes.routed import RoutedSAEMixin

DENSE_SHARE = 0.1
"""Share of the tokens above which a feature is dense."""

COMPARED = 4
"""One token in so many is reconstructed at every block, for what other blocks would give."""


class ReconstructionMetrics(NamedTuple):
    """Means over tokens, in normalized units: the scale of a block's stream has no influence."""

    n_tokens: int
    """Tokens evaluated."""
    norm_mse: float
    """||x_route - x_hat||^2 / ||x_route||^2 under the trained routing."""
    explained_variance: float | None
    """1 - sum ||x_route - x_hat||^2 / sum ||x_route - mean||^2, as SAELens defines it; null where
    all x_route are equal (to rounding), and there is no variance to explain."""
    l0: float
    """Active features per token."""
    dead_features: int
    """Features that no evaluated token activated."""
    share_by_block: dict[int, float]
    """Share of the tokens routed to each block."""
    mean_probs_by_block: dict[int, float]
    """Mean route probability of each block."""
    load_entropy: float
    """Entropy of the shares in nats; ln L when all blocks get the same number of tokens."""
    route_weight: float
    """Mean weight of the chosen block (its probability; 1 under uniform routing)."""
    margin: float
    """Mean difference of the two largest route probabilities."""
    norm_mse_by_block: dict[int, float | None]
    """NormMSE of the tokens routed to each block; null where there were none."""
    norm_mse_fixed_block: dict[int, float]
    """NormMSE had every token been routed to that one block: this and what follows from it is
    measured on one token in four (`COMPARED`)."""
    norm_mse_uniform: float
    """NormMSE had blocks been drawn uniformly for each token: the mean of the fixed blocks'."""
    norm_mse_matched: float
    """NormMSE of a random router with the same share per block."""
    norm_mse_best: float
    """NormMSE had each token been routed to the block where its error is least."""
    regret: float | None
    """NormMSE of the same tokens - norm_mse_best; null under soft routing, which chooses no single
    block."""
    dense_features: int | None = None
    """Features active on more than 10 % of the tokens; null in results that predate this field."""


class CrosscoderMetrics(NamedTuple):
    """Means over tokens, in normalized units; the target at block i is n(x_i)."""

    n_tokens: int
    """Tokens evaluated."""
    norm_mse: float
    """||n(x_i) - x_hat_i||^2 / ||n(x_i)||^2, mean over tokens and blocks."""
    explained_variance: float | None
    """1 - sum ||h - h_hat||^2 / sum ||h - mean||^2 of the concatenated streams h; null where all h
    are equal (to rounding)."""
    l0: float
    """Active features per token, which all blocks share."""
    dead_features: int
    """Features that no evaluated token activated."""
    norm_mse_by_block: dict[int, float]
    """NormMSE of each block."""
    dense_features: int | None = None
    """As in `ReconstructionMetrics`."""


@torch.no_grad()
def reconstruction_metrics(
    sae: RoutedSAEMixin, batches: Iterable[Float[Tensor, "_ L d"]]
) -> ReconstructionMetrics:
    """Reconstruction and routing metrics of a RouteSAE over batches of activations.

    Args:
        sae: A RouteSAE, for inference or training; its metadata names the routed blocks.
        batches: Residual streams after the routed blocks, of kept tokens only.

    Raises:
        UserError: there were no tokens.
    """
    sums = ReconstructionSums(sae)
    for x in batches:
        sums.add(x.to(sae.W_dec.device))
    return sums.metrics()


class Totals(dict[str, Tensor]):
    """Sums over batches by name, in float64 on the device, so that it is read only at the end."""

    def add(self, **values: Shaped[Tensor, ...]) -> None:
        """Add the sums of one batch."""
        for name, value in values.items():
            self[name] = self[name] + value if name in self else value.double()


class ReconstructionSums:
    """Running sums of a RouteSAE's metrics."""

    def __init__(self, sae: RoutedSAEMixin) -> None:
        self.sae, self.blocks = sae, routed_blocks(sae)
        self.n, self.n_compared, self.totals = 0, 0, Totals()

    def add(self, x: Float[Tensor, "tokens L d"]) -> Float[Tensor, " tokens"]:
        """Add a batch of residual streams of kept tokens; returns the NormMSE of each."""
        routing = self.sae.route(x)
        x_hat, fired = reconstruct_and_count(self.sae, routing.x_route)
        # from batch to batch, the first token to compare moves on as if they were one
        compared = slice(-self.n % COMPARED, None, COMPARED)
        errors = self.sae.route_errors(x[compared], routing.of(compared))
        error = norm_mse(x_hat, routing.x_route)
        chosen = torch.nn.functional.one_hot(routing.route, x.shape[-2]).to(torch.float64)
        top = routing.probs.topk(min(2, x.shape[-2]), dim=-1).values
        self.n += len(x)
        self.n_compared += len(errors)
        self.totals.add(
            error=error.sum(),
            squared_error=(routing.x_route - x_hat).pow(2).sum(),
            x=routing.x_route.sum(0),
            x_squared=routing.x_route.pow(2).sum(),
            fired=fired,
            routed=chosen.sum(0),
            probs=routing.probs.sum(0),
            weight=routing.weight.sum(),
            margin=(top[..., 0] - top[..., -1]).sum(),
            routed_error=(chosen * error.unsqueeze(-1)).sum(0),
            compared_error=error[compared].sum(),
            fixed_error=errors.sum(0),
            best_error=errors.min(-1).values.sum(),
        )
        return error

    def metrics(self) -> ReconstructionMetrics:
        """Metrics of all tokens added so far; a `UserError` if there were none."""
        require_tokens(self.n)
        n, n_compared, totals = self.n, self.n_compared, self.totals
        share, fixed = totals["routed"] / n, totals["fixed_error"] / n_compared
        best, compared = (
            float(totals[name] / n_compared) for name in ("best_error", "compared_error")
        )
        return ReconstructionMetrics(
            n_tokens=n,
            norm_mse=float(totals["error"] / n),
            explained_variance=_explained_variance(n, totals),
            l0=float(totals["fired"].sum() / n),
            dead_features=int((totals["fired"] == 0).sum()),
            share_by_block=_by_block(self.blocks, share),
            mean_probs_by_block=_by_block(self.blocks, totals["probs"] / n),
            load_entropy=float(torch.special.entr(share).sum()),
            route_weight=float(totals["weight"] / n),
            margin=float(totals["margin"] / n),
            norm_mse_by_block=mean_by_block(self.blocks, totals["routed_error"], totals["routed"]),
            norm_mse_fixed_block=_by_block(self.blocks, fixed),
            norm_mse_uniform=float(fixed.mean()),
            norm_mse_matched=float((share * fixed).sum()),
            norm_mse_best=best,
            regret=None if is_soft(self.sae) else compared - best,
            dense_features=_n_dense(n, totals),
        )


class CrosscoderSums:
    """Running sums of a crosscoder's metrics."""

    def __init__(self, sae: CrosscoderSAEMixin) -> None:
        self.sae, self.blocks = sae, routed_blocks(sae)
        self.n, self.totals = 0, Totals()

    def add(self, x: Float[Tensor, "tokens L d"]) -> Float[Tensor, " tokens"]:
        """Add a batch of residual streams of kept tokens; returns the NormMSE of each."""
        h = self.sae.concat_blocks(x)
        h_hat, fired = reconstruct_and_count(self.sae, h)
        row_per_block = (len(x), len(self.blocks), -1)
        self.n += len(x)
        error = norm_mse(h_hat.view(row_per_block), h.view(row_per_block))
        self.totals.add(
            error=error.sum(0),
            squared_error=(h - h_hat).pow(2).sum(),
            x=h.sum(0),
            x_squared=h.pow(2).sum(),
            fired=fired,
        )
        return error.mean(-1)

    def metrics(self) -> CrosscoderMetrics:
        """Metrics of all tokens added so far; a `UserError` if there were none."""
        require_tokens(self.n)
        error, fired = self.totals["error"] / self.n, self.totals["fired"]
        return CrosscoderMetrics(
            n_tokens=self.n,
            norm_mse=float(error.mean()),
            explained_variance=_explained_variance(self.n, self.totals),
            l0=float(fired.sum() / self.n),
            dead_features=int((fired == 0).sum()),
            norm_mse_by_block=_by_block(self.blocks, error),
            dense_features=_n_dense(self.n, self.totals),
        )


def require_tokens(n_tokens: int) -> None:
    """Raises a `UserError` if nothing was evaluated."""
    if n_tokens == 0:
        raise UserError("no tokens to evaluate: the text is empty or all of it is excluded")


def mean_by_block(
    blocks: list[int], totals: Float[Tensor, " L"], n_tokens: Float[Tensor, " L"]
) -> dict[int, float | None]:
    """Total over number of tokens for each routed block; None where there were no tokens."""
    pairs = zip(blocks, totals.tolist(), n_tokens.tolist(), strict=True)
    return {block: total / n if n > 0 else None for block, total, n in pairs}


def _by_block(blocks: list[int], values: Float[Tensor, " L"]) -> dict[int, float]:
    return dict(zip(blocks, values.tolist(), strict=True))


def _n_dense(n: int, totals: Totals) -> int:
    return int((totals["fired"] > DENSE_SHARE * n).sum())


def _explained_variance(n: int, totals: Totals) -> float | None:
    variance = totals["x_squared"] - totals["x"].pow(2).sum() / n
    if variance <= 1e-6 * totals["x_squared"]:  # sums of a batch are rounded to float32
        return None
    return float(1 - totals["squared_error"] / variance)
