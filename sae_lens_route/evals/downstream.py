"""How splicing an SAE into the model changes the model's predictions.

The model runs three times per batch: clean, with the SAE spliced in, and with the routed
residual streams set to zero. The change of the next-token distribution is the paper's KL, and the
change of cross-entropy SAELens's loss recovered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from sae_lens_route.errors import UserError
from sae_lens_route.evals.reconstruction import Totals, mean_by_block, require_tokens
from sae_lens_route.models.kinds import (
    LanguageModel,
    decoder_blocks,
    residual_of,
    with_residual,
)
from sae_lens_route.saes.crosscoder import CrosscoderSAEMixin
from sae_lens_route.saes.kinds import is_soft
from sae_lens_route.saes.metadata import routed_blocks
from sae_lens_route.saes.routed import RoutedSAEMixin, uniform_draws, with_routes
from sae_lens_route.splice import CrosscoderHook, RoutedHook, attach

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
    for tokens, kept in batches:
        with with_routes(sae, draws(tokens.shape)):
            sums.add(tokens, kept, log_probs(model, tokens))
    return sums.metrics()


class DownstreamSums:
    """Running sums of one SAE's metrics, on the model's device."""

    def __init__(
        self, model: LanguageModel, sae: RoutedSAEMixin | CrosscoderSAEMixin, unscaled: bool
    ) -> None:
        if is_soft(sae):
            raise UserError("routing='soft' mixes the blocks: there is no single one to splice at")
        self.model, self.sae, self.unscaled = model, sae, unscaled
        self.blocks = routed_blocks(sae)
        self.totals = Totals()

    def add(
        self,
        tokens: Int[Tensor, "batch pos"],
        kept: Bool[Tensor, "batch pos"],
        clean: Float[Tensor, "batch pos vocab"],
    ) -> None:
        """Splice and ablate at the kept tokens; `clean` are the model's log probabilities."""
        spliced, written = self._splice(tokens, kept)
        with _zeroed(self.model, dict(zip(self.blocks, written.unbind(-1), strict=True))):
            ablated = log_probs(self.model, tokens)
        # logits come from the last GPU of a model that is spread over several
        tokens, kept, written = (part.to(clean.device) for part in (tokens, kept, written))
        kl = _kl(clean, spliced)[kept].double()
        is_target = kept[:, 1:]
        self.totals.add(
            tokens=kept.sum(),
            kl=kl.sum(),
            kl_ablated=_kl(clean, ablated)[kept].double().sum(),
            kl_by_block=(written[kept] * kl.unsqueeze(-1)).sum(0),
            tokens_by_block=written[kept].sum(0),
            targets=is_target.sum(),
        )
        for name, predicted in (("clean", clean), ("spliced", spliced), ("ablated", ablated)):
            ce = _cross_entropy(predicted, tokens)[is_target].double().sum()
            self.totals.add(**{f"ce_{name}": ce})

    def _splice(
        self, tokens: Int[Tensor, "batch pos"], kept: Bool[Tensor, "batch pos"]
    ) -> tuple[Float[Tensor, "batch pos vocab"], Bool[Tensor, "batch pos L"]]:
        """The spliced model's log probabilities, and the kept tokens written to at each block."""
        sae, n_blocks = self.sae, len(self.blocks)
        with _attached(self.model, sae, self.unscaled) as hook:
            hooks: Any = [(hook.name, partial(_reconstruct, sae, kept))]
            with _streams(self.model, self.blocks) as streams:
                logits = self.model.run_with_hooks(tokens, return_type="logits", fwd_hooks=hooks)
            spliced = _log_softmax(logits)
            routing = hook.routing if isinstance(hook, RoutedHook) else None
        if routing is None or not isinstance(sae, RoutedSAEMixin):  # writes to every block
            return spliced, kept.unsqueeze(-1).expand(*kept.shape, n_blocks)
        edited = torch.stack([streams[i].to(sae.W_dec.device) for i in self.blocks], dim=-2)
        unchanged = (sae.route(edited).route == routing.route).to(kept.device)
        self.totals.add(agree=unchanged[kept].sum())
        written = nn.functional.one_hot(routing.route, n_blocks).bool().to(kept.device)
        return spliced, written & kept.unsqueeze(-1)

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


def log_probs(
    model: LanguageModel, tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos vocab"]:
    """Log probabilities of the next token at every position, in float32 at least."""
    return _log_softmax(model(tokens, return_type="logits"))


def _log_softmax(logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, "batch pos vocab"]:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _kl(
    clean: Float[Tensor, "batch pos vocab"], other: Float[Tensor, "batch pos vocab"]
) -> Float[Tensor, "batch pos"]:
    return (clean.exp() * (clean - other)).sum(-1)


def _cross_entropy(
    log_probs: Float[Tensor, "batch pos vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch targets"]:
    """Loss at every position that has a next token, in nats."""
    return -log_probs[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)


def _attached(
    model: LanguageModel, sae: RoutedSAEMixin | CrosscoderSAEMixin, unscaled: bool
) -> RoutedHook | CrosscoderHook:
    if isinstance(sae, RoutedSAEMixin):
        return attach(model, sae, unscaled=unscaled)
    return attach(model, sae)


def _reconstruct(
    sae: RoutedSAEMixin | CrosscoderSAEMixin,
    kept: Bool[Tensor, "batch pos"],
    value: Float[Tensor, "batch pos d"],
    hook: HookPoint,
) -> Float[Tensor, "batch pos d"]:
    """A hook function that puts the SAE's reconstruction at the kept tokens."""
    x_hat = sae.decode(sae.encode(value)).to(value.dtype)
    return torch.where(kept.unsqueeze(-1).to(value.device), x_hat, value)


@contextmanager
def _streams(model: LanguageModel, blocks: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Block -> the residual stream after it, edits included, as the next block last received it."""
    streams: dict[int, Tensor] = {}

    def keep_input(block: int, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        streams[block] = args[0] if args else kwargs["hidden_states"]

    def keep_output(block: int, _module: Any, _args: Any, output: Any) -> None:
        streams[block] = residual_of(output)

    modules, last = decoder_blocks(model), blocks[-1]
    handles = [
        modules[i + 1].register_forward_pre_hook(partial(keep_input, i), with_kwargs=True)
        for i in range(blocks[0], last)
    ]
    handles.append(modules[last].register_forward_hook(partial(keep_output, last)))
    try:
        yield streams
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _zeroed(
    model: LanguageModel, tokens_by_block: Mapping[int, Bool[Tensor, "batch pos"]]
) -> Iterator[None]:
    """Set the residual stream after each of these blocks to zero at the given tokens."""

    def zero(here: Tensor, _module: Any, _args: Any, output: Any) -> Any:
        x = residual_of(output)
        return with_residual(output, x.masked_fill(here.to(x.device), 0))

    modules = decoder_blocks(model)
    handles = [
        modules[block].register_forward_hook(partial(zero, here.unsqueeze(-1)))
        for block, here in tokens_by_block.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
