"""How well a RouteSAE reconstructs, and how well its router chooses, on held-out tokens.

`reconstruction_metrics` needs activations only. Its centre is one table per batch: the error of
every token at every routed layer, had the token been sent there with the weight it was given. The
routed error, the random router's, every fixed layer's and the best possible choice are all read
off that table, so they compare the same dictionary on the same tokens.

`downstream_metrics` runs the model three times per batch: as it is, with the SAE spliced in, and
with the routed places set to zero. What they do to the next-token distribution is the paper's KL,
and SAELens's loss recovered.

Tokens that training left out (`exclude_special_tokens`) are neither spliced nor counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor, nn
from tqdm.auto import tqdm

from sae_lens_route.activations import RoutedActivationsStore
from sae_lens_route.baselines import StackedSAE
from sae_lens_route.models import LanguageModel, decoder_blocks
from sae_lens_route.router import Routing
from sae_lens_route.splice import StreamsHook, attach


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
    """Running sums of a RouteSAE's metrics on the device, read off it once at the end."""

    def __init__(self, sae: Any) -> None:
        cfg = self.cfg = sae.cfg
        self.sae = sae
        like = {"dtype": torch.float64, "device": sae.W_dec.device}
        self.n = 0
        self.error = torch.zeros((), **like)
        self.squared_error = torch.zeros((), **like)
        self.x = torch.zeros(cfg.d_in, **like)
        self.x_squared = torch.zeros((), **like)
        self.fired = torch.zeros(cfg.d_sae, **like)
        self.tokens = torch.zeros(cfg.n_routed_layers, **like)
        self.probs = torch.zeros(cfg.n_routed_layers, **like)
        self.weight = torch.zeros((), **like)
        self.margin = torch.zeros((), **like)
        self.routed_error = torch.zeros(cfg.n_routed_layers, **like)
        self.layer_error = torch.zeros(cfg.n_routed_layers, **like)
        self.best_error = torch.zeros((), **like)

    def add(self, x: Float[Tensor, "tokens L d"]) -> None:
        routing = self.sae.route(x)
        feature_acts = self.sae.encode(routing.x_route)
        x_hat = self.sae.decode(feature_acts)
        errors = self.sae.layer_errors(x, routing)
        error = token_error(routing.x_route, x_hat)
        chosen = torch.nn.functional.one_hot(routing.layer, x.shape[-2]).to(torch.float64)
        top = routing.probs.topk(min(2, x.shape[-2]), dim=-1).values
        self.n += len(x)
        self.error += error.sum()
        self.squared_error += (routing.x_route - x_hat).pow(2).sum()
        self.x += routing.x_route.sum(0)
        self.x_squared += routing.x_route.pow(2).sum()
        self.fired += (feature_acts != 0).sum(0)
        self.tokens += chosen.sum(0)
        self.probs += routing.probs.sum(0)
        self.weight += routing.weight.sum()
        self.margin += (top[..., 0] - top[..., -1]).sum()
        self.routed_error += (chosen * error.unsqueeze(-1)).sum(0)
        self.layer_error += errors.sum(0)
        self.best_error += errors.min(-1).values.sum()

    def metrics(self) -> ReconstructionMetrics:
        if self.n == 0:
            raise ValueError("no tokens to evaluate: the dataset gave none that are not excluded")
        n = self.n
        share = self.tokens / n
        fixed = self.layer_error / n
        norm_mse = float(self.error / n)
        best = float(self.best_error / n)
        variance = self.x_squared - self.x.pow(2).sum() / n
        by_layer = [
            float(e / t) if t > 0 else None
            for e, t in zip(self.routed_error, self.tokens, strict=True)
        ]
        return ReconstructionMetrics(
            n_tokens=n,
            norm_mse=norm_mse,
            explained_variance=float(1 - self.squared_error / variance),
            l0=float(self.fired.sum() / n),
            dead_features=int((self.fired == 0).sum()),
            share=share.tolist(),
            mean_probs=(self.probs / n).tolist(),
            load_entropy=float(torch.special.entr(share).sum()),
            route_weight=float(self.weight / n),
            margin=float(self.margin / n),
            norm_mse_by_layer=by_layer,
            norm_mse_fixed_layer=fixed.tolist(),
            norm_mse_uniform=float(fixed.mean()),
            norm_mse_matched=float((share * fixed).sum()),
            norm_mse_best=best,
            regret=norm_mse - best if self.cfg.routing != "soft" else None,
        )


def token_error(x: Float[Tensor, "... d"], x_hat: Float[Tensor, "... d"]) -> Float[Tensor, ...]:
    """NormMSE of each token: squared error over the target's squared norm."""
    return (x - x_hat).pow(2).sum(-1) / x.pow(2).sum(-1)


@torch.no_grad()
def reconstruction_metrics(
    sae: Any, batches: Iterable[Float[Tensor, "_ L d"]]
) -> ReconstructionMetrics:
    """Reconstruction and routing metrics of a RouteSAE over batches of activations.

    Args:
        sae: A RouteSAE, for inference or training.
        batches: Residual streams after the routed blocks; excluded tokens are already left out.

    Raises:
        ValueError: there were no tokens.
    """
    sums = _Sums(sae)
    for x in batches:
        sums.add(x.to(sae.W_dec.device))
    return sums.metrics()


class CrosscoderMetrics(NamedTuple):
    """Means over tokens, in normalised units; a layer's stream is n(x) of that layer."""

    n_tokens: int
    """Tokens evaluated."""
    norm_mse: float
    """||n(x_i) - x_hat_i||^2 / ||n(x_i)||^2, mean over tokens and layers."""
    explained_variance: float
    """1 - sum ||h - h_hat||^2 / sum ||h - mean||^2 of the stacked streams h."""
    l0: float
    """Active features per token, one code for all layers."""
    dead_features: int
    """Features that no evaluated token activated."""
    norm_mse_by_layer: list[float | None]
    """NormMSE of each layer."""


class _CrosscoderSums:
    """Running sums of a crosscoder's metrics on the device."""

    def __init__(self, sae: Any) -> None:
        self.sae = sae
        like = {"dtype": torch.float64, "device": sae.W_dec.device}
        self.n = 0
        self.layer_error = torch.zeros(sae.cfg.n_routed_layers, **like)
        self.squared_error = torch.zeros((), **like)
        self.h = torch.zeros(sae.cfg.d_in, **like)
        self.h_squared = torch.zeros((), **like)
        self.fired = torch.zeros(sae.cfg.d_sae, **like)

    def add(self, x: Float[Tensor, "tokens L d"]) -> None:
        h = self.sae.stack(x)
        feature_acts = self.sae.encode(h)
        h_hat = self.sae.decode(feature_acts)
        by_layer = (len(x), self.sae.cfg.n_routed_layers, -1)
        self.n += len(x)
        self.layer_error += token_error(h.view(by_layer), h_hat.view(by_layer)).sum(0)
        self.squared_error += (h - h_hat).pow(2).sum()
        self.h += h.sum(0)
        self.h_squared += h.pow(2).sum()
        self.fired += (feature_acts != 0).sum(0)

    def metrics(self) -> CrosscoderMetrics:
        if self.n == 0:
            raise ValueError("no tokens to evaluate: the dataset gave none that are not excluded")
        by_layer = self.layer_error / self.n
        variance = self.h_squared - self.h.pow(2).sum() / self.n
        return CrosscoderMetrics(
            n_tokens=self.n,
            norm_mse=float(by_layer.mean()),
            explained_variance=float(1 - self.squared_error / variance),
            l0=float(self.fired.sum() / self.n),
            dead_features=int((self.fired == 0).sum()),
            norm_mse_by_layer=by_layer.tolist(),
        )


# --- downstream ----------------------------------------------------------------------------------

PAPER_CONTEXT = 512
_MIN_ABLATION_COST = 0.05
"""Loss recovered divides by what ablating costs; below this many nats it says nothing."""


class DownstreamMetrics(NamedTuple):
    """What splicing the SAE in does to the model's predictions. Nats, means over tokens."""

    n_tokens: int
    """Tokens whose next-token distributions were compared."""
    kl: float
    """KL(clean || spliced), nats per token."""
    kl_per_512_tokens: float
    """The same summed over a 512-token sequence, as the paper reports it."""
    kl_by_layer: list[float | None]
    """KL at the tokens routed to each layer; null where none was."""
    kl_ablated: float
    """KL(clean || routed places set to zero), nats per token."""
    ce_clean: float
    """Next-token cross-entropy of the clean model."""
    ce_spliced: float
    """The same with the SAE spliced in."""
    ce_ablated: float
    """The same with the routed places set to zero."""
    delta_ce: float
    """ce_spliced - ce_clean."""
    loss_recovered: float | None
    """1 - delta_ce / (ce_ablated - ce_clean); null when ablating costs less than 0.05 nats."""
    route_agreement: float | None
    """Share of tokens that the spliced model's own streams would be routed to the same layer; null
    for a crosscoder."""


class _DownstreamSums:
    """Running sums of one SAE's downstream metrics, read off the device once at the end."""

    def __init__(self, sae: Any, unscaled: bool) -> None:
        if _is_soft(sae):
            raise ValueError("routing='soft': it mixes layers, so there is no place to splice into")
        self.sae, self.unscaled = sae, unscaled
        self.device = sae.W_dec.device
        like = {"dtype": torch.float64, "device": self.device}
        names = ("tokens", "kl", "kl_ablated", "clean", "spliced", "ablated", "agree", "targets")
        self.totals = {name: torch.zeros((), **like) for name in names}
        self.kl_by_layer = torch.zeros(sae.cfg.n_routed_layers, **like)
        self.tokens_by_layer = torch.zeros(sae.cfg.n_routed_layers, **like)

    def add(
        self,
        model: LanguageModel,
        tokens: Int[Tensor, "batch pos"],
        kept: Bool[Tensor, "batch pos"],
        clean: Float[Tensor, "batch pos vocab"],
    ) -> None:
        """Splice and ablate at the kept tokens; `clean` are the model's own log probabilities."""
        sae, totals = self.sae, self.totals
        with attach(model, sae, unscaled=self.unscaled) as hook, _streams(model, hook) as streams:
            spliced = _with_hook_function(model, tokens, hook, partial(_reconstruct, sae, kept))
            blocks = hook.routed_blocks
            routing: Routing | None = getattr(hook, "routing", None)
            met = [streams[i].to(self.device) for i in blocks]
        if routing is not None:
            again = sae.route(torch.stack(met, dim=-2)).layer
            totals["agree"] += (again == routing.layer)[kept].sum()
            places = nn.functional.one_hot(routing.layer, len(blocks)).bool()
        else:  # a crosscoder writes to every block
            places = kept.to(self.device).unsqueeze(-1).expand(*kept.shape, len(blocks))
        places = places & kept.to(self.device).unsqueeze(-1)
        with _zeroed(model, dict(zip(blocks, places.unbind(-1), strict=True))):
            ablated = _log_probs(model, tokens)
        kl = _kl(clean, spliced)[kept].double()
        self.kl_by_layer += (places[kept] * kl.unsqueeze(-1)).sum(0)
        self.tokens_by_layer += places[kept].sum(0)
        totals["tokens"] += kept.sum()
        totals["kl"] += kl.sum()
        totals["kl_ablated"] += _kl(clean, ablated)[kept].double().sum()
        is_target = kept[:, 1:]
        totals["targets"] += is_target.sum()
        for name, log_probs in (("clean", clean), ("spliced", spliced), ("ablated", ablated)):
            totals[name] += _cross_entropy(log_probs, tokens)[is_target].double().sum()

    def metrics(self) -> DownstreamMetrics:
        n = int(self.totals["tokens"])
        if n == 0:
            raise ValueError("no tokens to evaluate: the dataset gave none that are not excluded")
        kl = float(self.totals["kl"] / n)
        targets = self.totals["targets"]
        ce = {k: float(self.totals[k] / targets) for k in ("clean", "spliced", "ablated")}
        delta, cost = ce["spliced"] - ce["clean"], ce["ablated"] - ce["clean"]
        return DownstreamMetrics(
            n_tokens=n,
            kl=kl,
            kl_per_512_tokens=PAPER_CONTEXT * kl,
            kl_by_layer=[
                float(k / t) if t > 0 else None
                for k, t in zip(self.kl_by_layer, self.tokens_by_layer, strict=True)
            ],
            kl_ablated=float(self.totals["kl_ablated"] / n),
            ce_clean=ce["clean"],
            ce_spliced=ce["spliced"],
            ce_ablated=ce["ablated"],
            delta_ce=delta,
            loss_recovered=1 - delta / cost if cost >= _MIN_ABLATION_COST else None,
            route_agreement=None if _is_stacked(self.sae) else float(self.totals["agree"] / n),
        )


@torch.no_grad()
def downstream_metrics(
    model: LanguageModel,
    sae: Any,
    batches: Iterable[tuple[Int[Tensor, "_ _"], Bool[Tensor, "_ _"]]],
    *,
    unscaled: bool = False,
) -> DownstreamMetrics:
    """KL, cross-entropy and routing agreement of a model with a RouteSAE spliced in.

    Args:
        model: The model `sae` was trained on, with nothing attached.
        sae: A RouteSAE with hard or uniform routing.
        batches: Contexts, and which of their tokens to splice and count.
        unscaled: Leave p out on both sides of the SAE, as the paper's code does to evaluate.

    Raises:
        ValueError: there were no tokens, or the routing is soft (it has no place to write to).
    """
    sums = _DownstreamSums(sae, unscaled)
    for tokens, kept in batches:
        sums.add(model, tokens, kept, _log_probs(model, tokens))
    return sums.metrics()


def _cross_entropy(
    log_probs: Float[Tensor, "batch pos vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch targets"]:
    """Loss at every position that has a next token, in nats."""
    return -log_probs[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)


def _log_probs(model: Any, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
    return model(tokens, return_type="logits").float().log_softmax(-1)


def _with_hook_function(model: Any, tokens: Tensor, hook: StreamsHook, function: Any) -> Tensor:
    logits = model.run_with_hooks(tokens, return_type="logits", fwd_hooks=[(hook.name, function)])
    return logits.float().log_softmax(-1)


def _reconstruct(
    sae: Any,
    kept: Bool[Tensor, "batch pos"],
    x_route: Float[Tensor, "batch pos d"],
    hook: Any,
) -> Float[Tensor, "batch pos d"]:
    x_hat = sae.decode(sae.encode(x_route)).to(x_route.dtype)
    return torch.where(kept.unsqueeze(-1).to(x_route.device), x_hat, x_route)


def _kl(
    clean: Float[Tensor, "batch pos vocab"], other: Float[Tensor, "batch pos vocab"]
) -> Float[Tensor, "batch pos"]:
    return (clean.exp() * (clean - other)).sum(-1)


@contextmanager
def _streams(model: LanguageModel, hook: StreamsHook) -> Iterator[dict[int, Tensor]]:
    """Block -> the residual stream after it, edits included: what the next block was given last."""
    found: dict[int, Tensor] = {}

    def keep_input(block: int, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found[block] = args[0] if args else kwargs["hidden_states"]

    def keep_output(block: int, _module: Any, _args: Any, output: Any) -> None:
        found[block] = output[0] if isinstance(output, tuple) else output

    blocks = decoder_blocks(model)
    first, last = hook.routed_blocks[0], hook.routed_blocks[-1]
    handles = [
        blocks[i + 1].register_forward_pre_hook(partial(keep_input, i), with_kwargs=True)
        for i in range(first, last)
    ]
    handles.append(blocks[last].register_forward_hook(partial(keep_output, last)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _zeroed(
    model: LanguageModel, places: Mapping[int, Bool[Tensor, "batch pos"]]
) -> Iterator[None]:
    """The residual stream after each of these blocks set to zero at the tokens given for it."""

    def zero(here: Tensor, _module: Any, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0].masked_fill(here.to(output[0].device), 0), *output[1:])
        return output.masked_fill(here.to(output.device), 0)

    blocks = decoder_blocks(model)
    handles = [
        blocks[block].register_forward_hook(partial(zero, here.unsqueeze(-1)))
        for block, here in places.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Evaluation(NamedTuple):
    """Everything measured of one RouteSAE or crosscoder on one text."""

    reconstruction: ReconstructionMetrics | CrosscoderMetrics
    """In normalised units, from activations alone."""
    downstream: DownstreamMetrics | None
    """The model with the SAE spliced in; null under soft routing."""
    downstream_unscaled: DownstreamMetrics | None
    """The same without p on either side of the SAE: the convention of the paper's code. Null under
    soft routing, for a crosscoder, and when not asked for."""

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, for JSON."""
        return {k: None if v is None else v._asdict() for k, v in self._asdict().items()}


def evaluate(
    model: LanguageModel, sae: Any, dataset: Any, *, max_tokens: int = 50_000, batch_size: int = 8
) -> Evaluation:
    """Evaluate a RouteSAE or a crosscoder on the first `max_tokens` of a text.

    Args:
        model: The model `sae` was trained on.
        sae: A RouteSAE or a crosscoder with its metadata.
        dataset: A dataset, or what `load_text_dataset` takes.
        max_tokens: Tokens to read, excluded ones included.
        batch_size: Contexts in one forward pass.
    """
    options = {"max_tokens": max_tokens, "batch_size": batch_size, "unscaled": True}
    return evaluate_all(model, {"": sae}, dataset, **options)[""]


@torch.no_grad()
def evaluate_all(
    model: LanguageModel,
    saes: Mapping[str, Any],
    dataset: Any,
    *,
    max_tokens: int = 50_000,
    batch_size: int = 8,
    unscaled: bool = False,
) -> dict[str, Evaluation]:
    """Evaluate many SAEs of one model on the same text, read once, with one clean pass for all.

    Args:
        model: The model they were trained on.
        saes: RouteSAEs and crosscoders by name. All must leave out the same special tokens and
            begin contexts alike.
        dataset: A dataset, or what `load_text_dataset` takes.
        max_tokens: Tokens to read, excluded ones included.
        batch_size: Contexts in one forward pass.
        unscaled: Also splice without p, as the paper's code does.

    Raises:
        ValueError: there were no tokens, or two SAEs want the text read differently.
    """
    text = _common_text(model, saes, dataset, batch_size)
    sums = {name: _EvaluationSums(sae, unscaled) for name, sae in saes.items()}
    total = math.ceil(max(1, max_tokens // text.context_size) / batch_size)
    for tokens in tqdm(text.token_batches(max_tokens), "evaluating", total, unit="batch"):
        kept = text.kept(tokens)
        streams = dict(zip(text.hook_names, text.layer_activations(tokens), strict=True))
        needs_clean = any(each.downstream for each in sums.values())
        clean = _log_probs(model, tokens) if needs_clean else None
        for each in sums.values():
            each.add(model, tokens, kept, streams, clean)
    return {name: each.evaluation() for name, each in sums.items()}


def _common_text(
    model: LanguageModel, saes: Mapping[str, Any], dataset: Any, batch_size: int
) -> RoutedActivationsStore:
    """The text as all of the SAEs read it, with the residual streams that any of them reads."""
    by_block: dict[int, str] = {}
    readings: dict[str, tuple[Any, ...]] = {}
    for name, sae in saes.items():
        metadata = sae.cfg.metadata
        by_block.update(zip(metadata.routed_layers or (), metadata.hook_names, strict=False))
        excluded = metadata.exclude_special_tokens
        readings[name] = (metadata.context_size, metadata.prepend_bos, str(excluded))
    if len(set(readings.values())) > 1:
        raise ValueError(
            f"the SAEs read text differently (context_size, prepend_bos, exclude_special_tokens): "
            f"{readings}; evaluate them in groups"
        )
    first = next(iter(saes.values()))
    text = RoutedActivationsStore.from_sae(
        model, first, dataset, store_batch_size_prompts=batch_size
    )
    if by_block:
        text.hook_names = [by_block[block] for block in sorted(by_block)]
    return text


class _EvaluationSums:
    """Running sums of all that is measured of one SAE."""

    def __init__(self, sae: Any, unscaled: bool) -> None:
        self.sae = sae
        self.reconstruction = _CrosscoderSums(sae) if _is_stacked(sae) else _Sums(sae)
        conventions = (False, True) if unscaled and not _is_stacked(sae) else (False,)
        self.downstream = {
            convention: _DownstreamSums(sae, convention)
            for convention in conventions
            if not _is_soft(sae)
        }

    def add(
        self,
        model: LanguageModel,
        tokens: Int[Tensor, "batch pos"],
        kept: Bool[Tensor, "batch pos"],
        streams: Mapping[str, Float[Tensor, "batch pos d"]],
        clean: Float[Tensor, "batch pos vocab"] | None,
    ) -> None:
        device = self.sae.W_dec.device
        own = [streams[name][kept].to(device) for name in self.sae.cfg.metadata.hook_names]
        self.reconstruction.add(torch.stack(own, dim=-2))
        for sums in self.downstream.values():
            sums.add(model, tokens, kept, cast(Tensor, clean))

    def evaluation(self) -> Evaluation:
        scaled, unscaled = self.downstream.get(False), self.downstream.get(True)
        return Evaluation(
            self.reconstruction.metrics(),
            None if scaled is None else scaled.metrics(),
            None if unscaled is None else unscaled.metrics(),
        )


def _is_stacked(sae: Any) -> bool:
    return isinstance(sae, StackedSAE)


def _is_soft(sae: Any) -> bool:
    return getattr(sae.cfg, "routing", None) == "soft"


def saelens_metrics(
    model: LanguageModel, sae: Any, dataset: Any, *, max_tokens: int = 50_000, batch_size: int = 8
) -> dict[str, Any]:
    """SAELens's own `run_evals` at the routed hook, every metric on.

    Its ablation sets the routed activation to zero, which leaves each token the mean of its stream;
    ours sets the stream itself to zero, as the paper's code does.
    """
    store = RoutedActivationsStore.from_sae(
        model, sae, dataset, store_batch_size_prompts=batch_size
    )
    n_batches = max(1, max_tokens // (batch_size * store.context_size))
    excluded = store.exclude_special_tokens
    with attach(model, sae):
        metrics, featurewise = run_evals(
            sae=sae,
            activation_store=store,
            model=cast(Any, model),
            activation_scaler=ActivationScaler(),
            eval_config=get_eval_everything_config(
                batch_size_prompts=batch_size,
                n_eval_reconstruction_batches=n_batches,
                n_eval_sparsity_variance_batches=n_batches,
            ),
            exclude_special_tokens=False if excluded is None else excluded.tolist(),
        )
    return {**metrics, "featurewise": featurewise}
