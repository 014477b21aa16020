"""RouteSAEs: a router in front of any SAELens architecture.

`RoutedSAE` and `RoutedTrainingSAE` are mixins that add the router to a SAELens class and change
nothing else of it: `encode` and `decode` keep working on the routed activation `[..., d]`, what
SAELens's tools find at the routed hook. Each architecture is four short class statements.

Training takes batches `[tokens, L, d]` in SAELens's own `SAETrainer`: the mixin routes them and
hands the routed activation to the base class's `training_forward_pass`. The two things the paper
adds to that pass enter through the base's own seams: the loss through `mse_loss_fn`, the decoder
norm through the step counter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float
from sae_lens.registry import (
    SAE_CLASS_REGISTRY,
    SAE_TRAINING_CLASS_REGISTRY,
    get_sae_class,
    register_sae_class,
    register_sae_training_class,
)
from sae_lens.saes.sae import (
    SAE,
    SAEConfig,
    TrainingSAE,
    TrainingSAEConfig,
    TrainStepInput,
    TrainStepOutput,
)
from sae_lens.saes.topk_sae import (
    TopKSAE,
    TopKSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from torch import Tensor, nn
from typing_extensions import override

from sae_lens_route.router import Aggregation, Routing, RoutingMode, route

LossName = Literal["normalized_mse", "mse"]


def normalized_mse(
    preds: Float[Tensor, "... d"], target: Float[Tensor, "... d"]
) -> Float[Tensor, "... d"]:
    """Squared error of each coordinate over the target's squared norm; sums over d to NormMSE.

    The target is not detached: it is the router's output, and the router learns through it.
    """
    return (preds - target).pow(2) / target.pow(2).sum(dim=-1, keepdim=True)


def _mse(preds: Float[Tensor, "... d"], target: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
    return (preds - target).pow(2)


if TYPE_CHECKING:  # what the mixins are mixed into
    _ConfigBase, _TrainingConfigBase = SAEConfig, TrainingSAEConfig
    _Base, _TrainingBase = SAE[Any], TrainingSAE[Any]
else:
    _ConfigBase = _TrainingConfigBase = _Base = _TrainingBase = object


@dataclass
class RoutedConfig(_ConfigBase):
    """Routing options, added to a SAELens configuration.

    Args:
        n_routed_layers: L, how many residual streams the router chooses from.
        routing: "hard" (one layer per token, scaled by its probability), "soft" (the mixture) or
            "uniform" (a layer drawn at random, the paper's Random baseline).
        aggregation: how the layers are pooled for the router: "sum", "mean" or "attention".
        routing_seed: seed of the uniform draw.
        normalize_activations: "none": routing normalises every layer per token already.
    """

    n_routed_layers: int = 9
    routing: RoutingMode = "hard"
    aggregation: Aggregation = "sum"
    routing_seed: int = 0

    @override
    @classmethod
    def architecture(cls) -> str:
        return f"route_{super().architecture()}"  # type: ignore[safe-super]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_routed_layers < 1:
            raise ValueError(f"n_routed_layers={self.n_routed_layers}: at least one is needed")
        _check_choice("routing", self.routing, get_args(RoutingMode))
        _check_choice("aggregation", self.aggregation, get_args(Aggregation))
        if self.normalize_activations != "none":
            raise ValueError(
                f"normalize_activations={self.normalize_activations!r}: routing normalises every "
                "layer per token already, so it must be 'none'"
            )
        k = getattr(self, "k", None)
        if k is not None and not 0 < k <= self.d_sae:
            raise ValueError(f"k={k}: must be between 1 and d_sae={self.d_sae}")


def _check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{field}={value!r}: must be one of {', '.join(map(repr, choices))}")


class RoutedSAE(_Base):
    """Adds `W_router [d, L]` and `route` to a SAELens SAE; goes before it in the bases."""

    W_router: nn.Parameter
    q_router: nn.Parameter
    cfg: Any
    _generator: torch.Generator | None = None

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        cfg = self.cfg
        like = {"dtype": self.dtype, "device": self.device}
        # the reference's nn.Linear(d, L): uniform within 1/sqrt(d)
        router = torch.empty(cfg.d_in, cfg.n_routed_layers, **like)
        self.W_router = nn.Parameter(nn.init.uniform_(router, -(cfg.d_in**-0.5), cfg.d_in**-0.5))
        if cfg.aggregation == "attention":
            self.q_router = nn.Parameter(torch.zeros(cfg.d_in, **like))

    def route(self, x: Float[Tensor, "... L d"]) -> Routing:
        """Route residual streams, one per routed layer and in order (Eq. 5-9, 14).

        Raises:
            ValueError: the last two axes are not `[n_routed_layers, d_in]`.
        """
        expected = (self.cfg.n_routed_layers, self.cfg.d_in)
        if tuple(x.shape[-2:]) != expected:
            raise ValueError(
                f"route takes [..., n_routed_layers, d_in] = [..., {expected[0]}, {expected[1]}], "
                f"got {list(x.shape)}"
            )
        return route(
            x.to(self.dtype),
            self.W_router,
            routing=self.cfg.routing,
            aggregation=self.cfg.aggregation,
            q_router=self.q_router if self.cfg.aggregation == "attention" else None,
            generator=self._uniform_generator(x.device),
        )

    def encode_layers(self, x: Float[Tensor, "... L d"]) -> Float[Tensor, "... d_sae"]:
        """Feature activations of residual streams: route, then encode."""
        return self.encode(self.route(x).x_route)

    def _uniform_generator(self, device: torch.device) -> torch.Generator | None:
        if self.cfg.routing != "uniform":
            return None
        if self._generator is None or self._generator.device != device:
            self._generator = torch.Generator(device).manual_seed(self.cfg.routing_seed)
        return self._generator

    def __getstate__(self) -> dict[str, Any]:
        # a generator can be neither copied nor pickled; a copy draws from the seed again
        return {**self.__dict__, "_generator": None}

    @override
    @torch.no_grad()
    def fold_W_dec_norm(self) -> None:
        """Nothing to do where the decoder rows have unit norm, as in every saved RouteSAE."""
        norms = self.W_dec.norm(dim=-1)
        if not torch.allclose(norms, torch.ones_like(norms), atol=1e-4):
            super().fold_W_dec_norm()


@dataclass(kw_only=True)
class RoutedTrainingConfig(RoutedConfig, _TrainingConfigBase):
    """Training options of a RouteSAE, added to a SAELens training configuration.

    Args:
        loss: "normalized_mse" (Eq. 12 as the paper's code computes it, blind to the scale of p) or
            "mse" (Eq. 12 as printed; it pays the router for shrinking p).
        decoder_norm_interval: decoder rows are set to unit norm before the first step, then after
            steps 0, N, 2N, ... and before saving; 0 leaves them alone.
        decoder_init_norm: None starts as the reference does (encoder uniform within 1/sqrt(d),
            decoder its transpose with unit rows); a number is SAELens's initialisation.
    """

    loss: LossName = "normalized_mse"
    decoder_norm_interval: int = 10
    decoder_init_norm: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice("loss", self.loss, get_args(LossName))
        if self.decoder_norm_interval < 0:
            raise ValueError(f"decoder_norm_interval={self.decoder_norm_interval}: must be >= 0")

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        base = super().get_inference_config_class()
        if issubclass(base, RoutedConfig):
            return base
        # SAELens saves some architectures as another (batchtopk as jumprelu): route that one
        return get_sae_class(f"route_{base.architecture()}")[1]


class RoutedTrainingSAE(RoutedSAE, _TrainingBase):
    """Adds routing to a SAELens training SAE; `sae_in` of a step is `[tokens, L, d]`."""

    def __init__(self, cfg: Any, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self.mse_loss_fn = normalized_mse if cfg.loss == "normalized_mse" else _mse

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        if self.cfg.decoder_init_norm is None:
            # SAELens draws within sqrt(6/d), the reference's nn.Linear within 1/sqrt(d)
            self.W_enc.data.mul_(6**-0.5)
            self.W_dec.data.mul_(6**-0.5)

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One step on residual streams; the output's `sae_in` is the routed activation.

        `metrics` gains `route_share/i` (share of the tokens sent to routed layer i),
        `route_weight` (mean probability of the chosen layer) and `route_entropy` (nats, of the
        mean p); all are computed only when read.
        """
        if self._decoder_norm_is_due(step_input.n_training_steps):
            self.normalize_decoder()
        routing = self.route(step_input.sae_in)
        if getattr(self.cfg, "aux_loss_coefficient", None) == 0:
            # without a mask SAELens skips the auxiliary loss, and the count that stalls a GPU
            step_input = replace(step_input, dead_neuron_mask=None)
        output = super().training_forward_pass(replace(step_input, sae_in=routing.x_route))
        output.metrics.update(_route_metrics(routing, self.cfg.n_routed_layers))
        return output

    def _decoder_norm_is_due(self, step: int) -> bool:
        """Before the first step, and at the start of the step that follows 0, N, 2N, ..."""
        interval = self.cfg.decoder_norm_interval
        return interval > 0 and (step == 0 or (step - 1) % interval == 0)

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Set every decoder row to unit norm, in place."""
        self.W_dec.data.div_(self.W_dec.data.norm(dim=-1, keepdim=True).clamp(min=1e-8))

    @override
    def save_inference_model(self, path: Any) -> Any:
        if self.cfg.decoder_norm_interval > 0:
            self.normalize_decoder()
        return super().save_inference_model(path)


def _route_metrics(routing: Routing, n_layers: int) -> dict[str, Any]:
    """Route statistics as callables, so that a step that is not logged pays nothing for them."""
    layer, probs, weight = routing.layer, routing.probs.detach(), routing.weight.detach()

    def share(index: int) -> Tensor:
        return (layer == index).float().mean()

    def entropy() -> Tensor:
        mean_probs = probs.flatten(0, -2).mean(0)
        return torch.special.entr(mean_probs).sum()

    return {
        **{f"route_share/{i}": (lambda i=i: share(i)) for i in range(n_layers)},
        "route_weight": lambda: weight.mean(),
        "route_entropy": entropy,
    }


@dataclass
class RouteTopKSAEConfig(RoutedConfig, TopKSAEConfig):
    """A RouteSAE with TopK, the paper's model."""

    k: int = 64


class RouteTopKSAE(RoutedSAE, TopKSAE):
    """A RouteSAE with TopK, for inference."""

    cfg: RouteTopKSAEConfig  # type: ignore[assignment]


@dataclass(kw_only=True)
class RouteTopKTrainingSAEConfig(RoutedTrainingConfig, TopKTrainingSAEConfig):
    """Training configuration of a RouteSAE with TopK; the defaults are the paper's."""

    k: int = 64
    aux_loss_coefficient: float = 0.0
    rescale_acts_by_decoder_norm: bool = False


class RouteTopKTrainingSAE(RoutedTrainingSAE, TopKTrainingSAE):
    """A RouteSAE with TopK, for training."""

    cfg: RouteTopKTrainingSAEConfig  # type: ignore[assignment]


def _register(
    sae: type[SAE],
    config: type[SAEConfig],
    training_sae: type[TrainingSAE],
    training_config: type[TrainingSAEConfig],
) -> None:
    """Make SAELens know an architecture; again after an autoreload, without its error."""
    architecture = config.architecture()
    SAE_CLASS_REGISTRY.pop(architecture, None)
    SAE_TRAINING_CLASS_REGISTRY.pop(architecture, None)
    # the training config looks its inference class up, so that one goes first
    register_sae_class(architecture, sae, config)
    register_sae_training_class(architecture, training_sae, training_config)


_register(RouteTopKSAE, RouteTopKSAEConfig, RouteTopKTrainingSAE, RouteTopKTrainingSAEConfig)
