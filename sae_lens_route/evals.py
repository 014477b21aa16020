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

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor, nn

from sae_lens_route.activations import RoutedActivationsStore
from sae_lens_route.models import LanguageModel, decoder_blocks
from sae_lens_route.router import Routing, normalize
from sae_lens_route.splice import RoutedHook, attach


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
    sae: Any, batches: Iterable[Float[Tensor, "_ L d"]]
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
    route_agreement: float
    """Share of tokens that the spliced model's own streams would be routed to the same layer."""


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
    if sae.cfg.routing == "soft":
        raise ValueError("routing='soft': it mixes layers, so there is no place to splice into")
    n_layers = sae.cfg.n_routed_layers
    device = sae.W_dec.device
    sums = dict.fromkeys(("kl_ablated", "clean", "spliced", "ablated", "agree"), 0.0)
    totals: dict[str, Any] = {k: torch.zeros((), dtype=torch.float64, device=device) for k in sums}
    kl_by_layer = torch.zeros(n_layers, dtype=torch.float64, device=device)
    tokens_by_layer = torch.zeros(n_layers, dtype=torch.float64, device=device)
    n_targets = torch.zeros((), dtype=torch.float64, device=device)
    for tokens, kept in batches:
        clean = _log_probs(model, tokens)
        with attach(model, sae, unscaled=unscaled) as hook, _streams(model, hook) as streams:
            spliced = _with_hook_function(model, tokens, hook, partial(_reconstruct, sae, kept))
            layer = cast(Routing, hook.routing).layer
            met = torch.stack([streams[i].to(device) for i in hook.routed_blocks], dim=-2)
            blocks = hook.routed_blocks
        with _zeroed(model, blocks, layer, kept):
            ablated = _log_probs(model, tokens)
        kl = _kl(clean, spliced)[kept].double()
        chosen = nn.functional.one_hot(layer[kept], n_layers).double()
        kl_by_layer += (chosen * kl.unsqueeze(-1)).sum(0)
        tokens_by_layer += chosen.sum(0)
        totals["kl_ablated"] += _kl(clean, ablated)[kept].double().sum()
        totals["agree"] += (sae.route(met).layer == layer)[kept].sum()
        is_target = kept[:, 1:]
        n_targets += is_target.sum()
        for name, log_probs in (("clean", clean), ("spliced", spliced), ("ablated", ablated)):
            ce = -log_probs[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)
            totals[name] += ce[is_target].double().sum()
    n = int(tokens_by_layer.sum())
    if n == 0:
        raise ValueError("no tokens to evaluate: the dataset gave none that are not excluded")
    kl = float(kl_by_layer.sum() / n)
    ce = {name: float(totals[name] / n_targets) for name in ("clean", "spliced", "ablated")}
    delta, cost = ce["spliced"] - ce["clean"], ce["ablated"] - ce["clean"]
    return DownstreamMetrics(
        n_tokens=n,
        kl=kl,
        kl_per_512_tokens=PAPER_CONTEXT * kl,
        kl_by_layer=[
            float(k / t) if t > 0 else None
            for k, t in zip(kl_by_layer, tokens_by_layer, strict=True)
        ],
        kl_ablated=float(totals["kl_ablated"] / n),
        ce_clean=ce["clean"],
        ce_spliced=ce["spliced"],
        ce_ablated=ce["ablated"],
        delta_ce=delta,
        loss_recovered=1 - delta / cost if cost >= _MIN_ABLATION_COST else None,
        route_agreement=float(totals["agree"] / n),
    )


def _log_probs(model: Any, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
    return model(tokens, return_type="logits").float().log_softmax(-1)


def _with_hook_function(model: Any, tokens: Tensor, hook: RoutedHook, function: Any) -> Tensor:
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
def _streams(model: LanguageModel, hook: RoutedHook) -> Iterator[dict[int, Tensor]]:
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
    model: LanguageModel,
    routed_blocks: list[int],
    layer: Int[Tensor, "batch pos"],
    kept: Bool[Tensor, "batch pos"],
) -> Iterator[None]:
    """Every counted token's residual stream set to zero after the block it was routed to."""

    def zero(here: Tensor, _module: Any, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0].masked_fill(here.to(output[0].device), 0), *output[1:])
        return output.masked_fill(here.to(output.device), 0)

    blocks = decoder_blocks(model)
    handles = [
        blocks[block].register_forward_hook(
            partial(zero, ((layer == i) & kept.to(layer.device)).unsqueeze(-1))
        )
        for i, block in enumerate(routed_blocks)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Evaluation(NamedTuple):
    """Everything measured of one RouteSAE on one text."""

    reconstruction: ReconstructionMetrics
    """In normalised units, from activations alone."""
    downstream: DownstreamMetrics | None
    """The model with the SAE spliced in; null under soft routing."""
    downstream_unscaled: DownstreamMetrics | None
    """The same without p on either side of the SAE: the convention of the paper's code."""

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, for JSON."""
        return {k: None if v is None else v._asdict() for k, v in self._asdict().items()}


def evaluate(
    model: LanguageModel, sae: Any, dataset: Any, *, max_tokens: int = 50_000, batch_size: int = 8
) -> Evaluation:
    """Evaluate a RouteSAE on the first `max_tokens` of a text.

    Args:
        model: The model `sae` was trained on.
        sae: A RouteSAE with its metadata.
        dataset: A dataset, or what `load_text_dataset` takes; read anew for each part.
        max_tokens: Tokens to read, excluded ones included.
        batch_size: Contexts in one forward pass.
    """

    def store() -> RoutedActivationsStore:
        return RoutedActivationsStore.from_sae(
            model, sae, dataset, store_batch_size_prompts=batch_size
        )

    def downstream(unscaled: bool) -> DownstreamMetrics | None:
        if sae.cfg.routing == "soft":
            return None
        text = store()
        batches = ((tokens, text.kept(tokens)) for tokens in text.token_batches(max_tokens))
        return downstream_metrics(model, sae, batches, unscaled=unscaled)

    return Evaluation(
        reconstruction=reconstruction_metrics(sae, store().activation_batches(max_tokens)),
        downstream=downstream(unscaled=False),
        downstream_unscaled=downstream(unscaled=True),
    )


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
