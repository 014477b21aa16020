"""How splicing an SAE into the model changes the model's predictions.

The model runs three times per batch: clean (once for all SAEs), with the SAE spliced in, and with
the routed residual streams set to zero. The change of the next-token distribution is the paper's
KL, and the change of cross-entropy SAELens's loss recovered.

The splice is that of `splice/`, at the kept tokens only. Here the clean streams, and so the routes,
are known before the pass: each token is edited at its own block in a single pass, with no clean
half, no replay and no hook point.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sae_lens_route.data.activations import residual_streams
from sae_lens_route.errors import UserError
from sae_lens_route.evals.predictions import CleanPass, Edit
from sae_lens_route.evals.reconstruction import Totals, mean_by_block, require_tokens
from sae_lens_route.models.kinds import LanguageModel, residual_hook_names
from sae_lens_route.saes.crosscoder import CrosscoderSAEMixin
from sae_lens_route.saes.kinds import is_soft
from sae_lens_route.saes.metadata import routed_blocks
from sae_lens_route.saes.reconstruct import reconstruct
from sae_lens_route.saes.routed import RoutedSAEMixin, uniform_draws, with_routes
from sae_lens_route.saes.router import Routing, normalization_stats
from sae_lens_route.splice import attach
from sae_lens_route.splice.hook import write_result

PAPER_CONTEXT = 512

_MIN_ABLATION_COST = 0.05
"""Nats. Loss recovered divides by the cost of ablation; below this it is mostly noise."""


class DownstreamMetrics(NamedTuple):
    """The model's predictions with the SAE spliced in. Nats, means over tokens."""

    n_tokens: int
    """Tokens whose next-token distributions were compared."""
    kl: float
    """KL(clean || spliced), nats per token."""
    kl_per_512_tokens: float
    """The same summed over a 512-token sequence, as the paper reports it."""
    kl_by_block: dict[int, float | None]
    """KL at the tokens routed to each block; null where there were none."""
    kl_ablated: float
    """KL(clean || routed streams set to zero), nats per token."""
    ce_clean: float
    """Next-token cross-entropy of the clean model."""
    ce_spliced: float
    """The same with the SAE spliced in."""
    ce_ablated: float
    """The same with the routed streams set to zero."""
    delta_ce: float
    """ce_spliced - ce_clean."""
    loss_recovered: float | None
    """1 - delta_ce / (ce_ablated - ce_clean); null when ablation costs less than 0.05 nats."""
    route_agreement: float | None
    """Share of tokens that would be routed to the same block from the spliced model's streams;
    1 under uniform routing, whose draw does not read them; null for a crosscoder."""


@torch.no_grad()
def downstream_metrics(
    model: LanguageModel,
    sae: RoutedSAEMixin | CrosscoderSAEMixin,
    batches: Iterable[tuple[Int[Tensor, "_ _"], Bool[Tensor, "_ _"]]],
    *,
    unscaled: bool = False,
) -> DownstreamMetrics:
    """KL, cross-entropy and routing agreement of a model with an SAE spliced in.

    Args:
        model: The model `sae` was trained on, with nothing attached.
        sae: A RouteSAE with hard or uniform routing, or a crosscoder.
        batches: Contexts, and which of their tokens to splice and count.
        unscaled: Leave p out on both sides of the SAE, as the paper's code does to evaluate.

    Raises:
        UserError: there were no tokens, or the routing is soft (it has no block to write to).
    """
    sums, draws = DownstreamSums(model, sae, unscaled), uniform_draws(sae)
    names = residual_hook_names(model, routed_blocks(sae))
    for tokens, kept in batches:
        streams = [x.to(sae.W_dec.device) for x in residual_streams(model, tokens, names)]
        with with_routes(sae, draws(tokens.shape)):
            sums.add(torch.stack(streams, dim=2), kept, CleanPass(model, tokens))
    return sums.metrics()


class DownstreamSums:
    """Running sums of one SAE's metrics, on the model's device."""

    def __init__(
        self, model: LanguageModel, sae: RoutedSAEMixin | CrosscoderSAEMixin, unscaled: bool
    ) -> None:
        if is_soft(sae):
            raise UserError("routing='soft' mixes the blocks: there is no single one to splice at")
        attach(model, sae).remove()  # raises unless the SAE fits the model, with nothing attached
        self.sae, self.unscaled = sae, unscaled
        self.blocks = routed_blocks(sae)
        self.totals = Totals()

    def add(
        self,
        streams: Float[Tensor, "batch pos L d"],
        kept: Bool[Tensor, "batch pos"],
        clean: CleanPass,
    ) -> Float[Tensor, "batch pos"]:
        """Splice and ablate at the kept tokens of a batch; returns the KL of each, 0 elsewhere.

        Args:
            streams: The clean residual streams that the SAE reads, on its device.
            kept: Which tokens to splice and count.
            clean: The clean model on the batch.
        """
        here = kept.to(streams.device)
        if isinstance(self.sae, RoutedSAEMixin):
            routing = self.sae.route(streams)
            written = nn.functional.one_hot(routing.route, len(self.blocks)).bool()
            written &= here.unsqueeze(-1)
            edits = _routed_edits(self.sae, routing, written, self.unscaled)
            spliced, after = clean.edited(dict(zip(self.blocks, edits, strict=True)))
            edited = torch.stack([after[block].to(streams.device) for block in self.blocks], dim=2)
            unchanged = self.sae.route(edited).route == routing.route
            self.totals.add(agree=unchanged[here].sum())
        else:  # writes to every block
            written = here.unsqueeze(-1).expand(*here.shape, len(self.blocks))
            edits = _crosscoder_edits(self.sae, streams, here)
            spliced, _ = clean.edited(dict(zip(self.blocks, edits, strict=True)))
        ablated = clean.ablated(self.blocks, written.to(kept.device))
        # logits come from the last GPU of a model that is spread over several
        kept, written = kept.to(clean.ce.device), written.to(clean.ce.device)
        kl, is_target = spliced.kl[kept], kept[:, 1:]
        self.totals.add(
            tokens=kept.sum(),
            kl=kl.sum(),
            kl_ablated=ablated.kl[kept].sum(),
            kl_by_block=(written[kept] * kl.unsqueeze(-1)).sum(0),
            tokens_by_block=written[kept].sum(0),
            targets=is_target.sum(),
            ce_clean=clean.ce[is_target].sum(),
            ce_spliced=spliced.ce[is_target].sum(),
            ce_ablated=ablated.ce[is_target].sum(),
        )
        return spliced.kl * kept

    def metrics(self) -> DownstreamMetrics:
        """Metrics of all tokens added so far; a `UserError` if there were none."""
        totals = self.totals
        n = int(totals.get("tokens", 0))
        require_tokens(n)
        kl = float(totals["kl"] / n)
        clean, spliced, ablated = (
            float(totals[name] / totals["targets"])
            for name in ("ce_clean", "ce_spliced", "ce_ablated")
        )
        delta, cost = spliced - clean, ablated - clean
        return DownstreamMetrics(
            n_tokens=n,
            kl=kl,
            kl_per_512_tokens=PAPER_CONTEXT * kl,
            kl_by_block=mean_by_block(
                self.blocks, totals["kl_by_block"], totals["tokens_by_block"]
            ),
            kl_ablated=float(totals["kl_ablated"] / n),
            ce_clean=clean,
            ce_spliced=spliced,
            ce_ablated=ablated,
            delta_ce=delta,
            loss_recovered=1 - delta / cost if cost >= _MIN_ABLATION_COST else None,
            route_agreement=float(totals["agree"] / n) if "agree" in totals else None,
        )


def _routed_edits(
    sae: RoutedSAEMixin, routing: Routing, written: Bool[Tensor, "batch pos L"], unscaled: bool
) -> list[Edit]:
    """For each route, the edit that puts the SAE's reconstruction at the tokens written there."""
    weight = torch.ones_like(routing.weight) if unscaled else routing.weight

    def edit(
        here: Bool[Tensor, "batch pos"], stream: Float[Tensor, "batch pos d"]
    ) -> Float[Tensor, "batch pos d"]:
        rows = stream[here.to(stream.device)]
        if len(rows) == 0:
            return stream
        x = rows.to(weight)
        mean, scale = (part.unsqueeze(-1) for part in normalization_stats(x))
        unit = scale / weight[here].unsqueeze(-1)
        value = (x - mean) / unit
        result = reconstruct(sae, value)
        unchanged = (result == value).all(dim=-1, keepdim=True)
        return _with_rows(stream, here, write_result(rows, value, result, mean, unit, unchanged))

    return [partial(edit, here) for here in written.unbind(-1)]


def _crosscoder_edits(
    sae: CrosscoderSAEMixin,
    streams: Float[Tensor, "batch pos L d"],
    kept: Bool[Tensor, "batch pos"],
) -> list[Edit]:
    """For each route, the edit that puts the reconstruction of the clean streams at kept tokens."""
    x = streams[kept].to(sae.dtype)
    h = sae.concat_blocks(x)
    h_hat = reconstruct(sae, h)
    unchanged = (h_hat == h).all(dim=-1, keepdim=True)
    value, result = h.view_as(x), h_hat.view_as(x)
    mean, scale = (part.unsqueeze(-1) for part in normalization_stats(x))

    def edit(i: int, stream: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d"]:
        rows = stream[kept.to(stream.device)]
        new = write_result(rows, value[:, i], result[:, i], mean[:, i], scale[:, i], unchanged)
        return _with_rows(stream, kept, new)

    return [partial(edit, i) for i in range(x.shape[1])]


def _with_rows(
    stream: Float[Tensor, "batch pos d"],
    here: Bool[Tensor, "batch pos"],
    rows: Float[Tensor, "n d"],
) -> Float[Tensor, "batch pos d"]:
    """A copy of the stream with other vectors at some of the tokens."""
    stream = stream.clone()
    stream[here.to(stream.device)] = rows
    return stream
