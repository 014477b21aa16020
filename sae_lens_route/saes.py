"""RouteSAEs: a router in front of any SAELens architecture.

`RoutedSAE` and `RoutedTrainingSAE` are mixins that add the router to a SAELens class and change
nothing else of it: `encode` and `decode` keep working on the routed activation `[..., d]`, what
SAELens's tools find at the routed hook. Each architecture is a few short class statements:

| architecture               | sparsity                          | saved as         |
|----------------------------|-----------------------------------|------------------|
| route_topk                 | k features per token, the paper's | route_topk       |
| route_batchtopk            | k per token on average            | route_jumprelu   |
| route_matryoshka_batchtopk | the same, nested dictionaries     | route_jumprelu   |
| route_jumprelu             | L0 penalty, trained thresholds    | route_jumprelu   |
| route_standard             | ReLU and an L1 penalty            | route_standard   |
| route_gated                | a gate with an L1 penalty         | route_gated      |

Training takes batches `[tokens, L, d]` in SAELens's own `SAETrainer`: the mixin routes them and
hands the routed activation to the base class's `training_forward_pass`. What the paper adds to that
pass enters through the base's own seams: the loss through `mse_loss_fn`, the units of the penalties
through `calculate_aux_loss`, the decoder norm through the step counter.

With one routed layer (`n_routed_layers=1`) there is nothing to choose, p is 1, and what is left is
the base class on n(x) of that layer: the single-layer baselines.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
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
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.gated_sae import (
    GatedSAE,
    GatedSAEConfig,
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
)
from sae_lens.saes.jumprelu_sae import (
    JumpReLUSAE,
    JumpReLUSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
)
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.sae import (
    SAE,
    SAEConfig,
    TrainingSAE,
    TrainingSAEConfig,
    TrainStepInput,
    TrainStepOutput,
)
from sae_lens.saes.standard_sae import (
    StandardSAE,
    StandardSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
)
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from torch import Tensor, nn
from typing_extensions import override

from sae_lens_route.router import (
    Aggregation,
    Routing,
    RoutingMode,
    balanced_assignment,
    normalize,
    route,
)
from sae_lens_route.sparse_topk import SparseTopKTrainingConfig, SparseTopKTrainingSAE

LossName = Literal["normalized_mse", "mse"]
RouterObjective = Literal["reconstruction", "assignment", "frozen"]

ASSIGNMENT_TEMPERATURE = 0.2
"""Of the assignment that the router learns, in units of the mean error."""
COMPARED = 4
"""One token in this many is encoded at every layer, for the router to learn from."""


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
        layer_shares: share of the tokens that uniform routing sends to each layer, adding up to 1;
            None means the same for all. It makes the random router that a trained one is held
            against.
        normalize_activations: "none": routing normalises every layer per token already.
    """

    n_routed_layers: int = 9
    routing: RoutingMode = "hard"
    aggregation: Aggregation = "sum"
    routing_seed: int = 0
    layer_shares: list[float] | None = None

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
        if self.layer_shares is not None:
            self._check_layer_shares(self.layer_shares)
        k = getattr(self, "k", None)
        if k is not None and not 0 < k <= self.d_sae:
            raise ValueError(f"k={k}: must be between 1 and d_sae={self.d_sae}")

    def _check_layer_shares(self, shares: list[float]) -> None:
        if self.routing != "uniform":
            raise ValueError(
                f"layer_shares={shares}: only routing='uniform' draws layers, not {self.routing!r}"
            )
        add_up = abs(sum(shares) - 1) <= 1e-3  # not so for NaN
        if len(shares) != self.n_routed_layers or min(shares) < 0 or not add_up:
            raise ValueError(
                f"layer_shares={shares}: give one share >= 0 for each of the "
                f"{self.n_routed_layers} routed layers, adding up to 1"
            )


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
            layer_shares=self._layer_shares(x.device),
            generator=self._uniform_generator(x.device),
        )

    def layer_errors(self, x: Float[Tensor, "... L d"], routing: Routing) -> Float[Tensor, "... L"]:
        """NormMSE of every token at every layer, each given the weight of the layer it was sent to.

        One weight for all layers, because the dictionary is trained on routed activations: at
        another layer's own small probability its biases alone would decide the error.
        """
        weight = routing.weight.unsqueeze(-1)
        errors = []
        for x_i in x.to(routing.x_route.dtype).unbind(-2):
            target = weight * normalize(x_i)
            errors.append(normalized_mse(self.decode(self.encode(target)), target).sum(-1))
        return torch.stack(errors, dim=-1)

    def _layer_shares(self, device: torch.device) -> Tensor | None:
        shares = self.cfg.layer_shares
        return None if shares is None else torch.tensor(shares, device=device)

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
        router_objective: "reconstruction" trains the router through p in the loss, as the paper
            does. "assignment" trains it to predict where each token is reconstructed best when
            every layer gets the same load (see `assignment_loss`). "frozen" leaves it at its random
            start.
        latent_bias: whether `b_enc` is trained, as in the paper's code, or stays at 0, as in its
            Eq. 10.
        decoder_norm_interval: decoder rows are set to unit norm before the first step, then after
            steps 0, N, 2N, ... and before saving; 0 leaves them alone.
        decoder_init_norm: None starts as the reference does (encoder uniform within 1/sqrt(d),
            decoder its transpose with unit rows); a number is SAELens's initialisation.
    """

    loss: LossName = "normalized_mse"
    router_objective: RouterObjective = "reconstruction"
    latent_bias: bool = True
    decoder_norm_interval: int = 10
    decoder_init_norm: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice("loss", self.loss, get_args(LossName))
        _check_choice("router_objective", self.router_objective, get_args(RouterObjective))
        if self.router_objective == "assignment" and self.routing != "hard":
            raise ValueError(
                f"router_objective='assignment': routing={self.routing!r} sends no token to one "
                "layer of the router's choice; it must be 'hard'"
            )
        if not self.latent_bias and "gated" in self.architecture():
            raise ValueError(f"latent_bias=False: {self.architecture()} has no b_enc to hold at 0")
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
        frozen = {"W_router", "q_router"} if cfg.router_objective == "frozen" else set()
        if not cfg.latent_bias:
            frozen.add("b_enc")
        for name, parameter in self.named_parameters():
            if name in frozen:
                parameter.requires_grad_(False)

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
        step_input = self.begin_step(step_input)
        x = step_input.sae_in
        routing = self.route(x)
        learns_assignment = self.cfg.router_objective == "assignment"
        x_route = routing.x_route.detach() if learns_assignment else routing.x_route
        output = super().training_forward_pass(replace(step_input, sae_in=x_route))
        if learns_assignment:
            loss = self.assignment_loss(x, routing)
            output.losses["assignment_loss"] = loss
            output.loss = output.loss + loss
        output.metrics.update(_route_metrics(routing, self.cfg.n_routed_layers))
        return output

    def assignment_loss(
        self, x: Float[Tensor, "tokens L d"], routing: Routing
    ) -> Float[Tensor, ""]:
        """Cross entropy, in nats, of the route probabilities against the balanced assignment.

        A quarter of the tokens are encoded at every layer, without gradients. The assignment of
        these tokens to layers that has the least error at equal loads is what p should be. Only the
        router learns from it: dictionary and router take turns, as in k-means, the dictionary
        getting better at what it is sent, the router sending tokens where they are easy.
        """
        compared = Routing(*(part[::COMPARED] for part in routing))
        with torch.no_grad():
            errors = self.layer_errors(x[::COMPARED], compared)
            target = balanced_assignment(errors / errors.mean(), ASSIGNMENT_TEMPERATURE)
        return -(target * compared.probs.clamp(min=1e-12).log()).sum(-1).mean()

    def begin_step(self, step_input: TrainStepInput) -> TrainStepInput:
        """Normalise the decoder if it is due, and pass on what SAELens's pass needs."""
        if self._decoder_norm_is_due(step_input.n_training_steps):
            self.normalize_decoder()
        if getattr(self.cfg, "aux_loss_coefficient", None) == 0:
            # without a mask SAELens skips the auxiliary loss, and the count that stalls a GPU
            return replace(step_input, dead_neuron_mask=None)
        return step_input

    @override
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Tensor,
        hidden_pre: Tensor,
        sae_out: Tensor,
    ) -> dict[str, Tensor]:
        """The architecture's penalties, in units that suit the loss.

        Beside the normalised loss an L1 norm is taken relative to the mean norm of x_route, a
        squared error to its mean squared norm. In SAELens's own units both would pay the router for
        shrinking p, and drown a loss that lies between 0 and 1.
        """
        losses = super().calculate_aux_loss(  # type: ignore[safe-super]
            step_input, feature_acts, hidden_pre, sae_out
        )
        assert isinstance(losses, dict)  # as all of SAELens's own classes give them
        if self.cfg.loss == "mse":
            return losses
        squared_norm = step_input.sae_in.pow(2).sum(dim=-1)
        units = {
            "l1_loss": lambda: squared_norm.sqrt().mean(),
            "auxiliary_reconstruction_loss": squared_norm.mean,
        }

        def off(loss: Tensor) -> bool:
            """It is a constant, which only shows while gradients are taken."""
            return torch.is_grad_enabled() and not loss.requires_grad

        return {
            name: loss if name not in units or off(loss) else loss / units[name]()
            for name, loss in losses.items()
        }

    def _decoder_norm_is_due(self, step: int) -> bool:
        """Before the first step, and at the start of the step that follows 0, N, 2N, ..."""
        interval = self.cfg.decoder_norm_interval
        return interval > 0 and (step == 0 or (step - 1) % interval == 0)

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Set every decoder row to unit norm, in place."""
        self.W_dec.data.copy_(_unit_rows(self.W_dec.data))

    @override
    def save_inference_model(self, path: Any) -> Any:
        if self.cfg.decoder_norm_interval > 0:
            self.normalize_decoder()
        return super().save_inference_model(path)


def _unit_rows(W_dec: Float[Tensor, "d_sae d"]) -> Float[Tensor, "d_sae d"]:
    """Rows of unit norm; those that have it, to rounding, keep their bits, so twice is once."""
    norm = W_dec.norm(dim=-1, keepdim=True).clamp(min=1e-8)
    return W_dec / torch.where((norm - 1).abs() < 1e-6, 1.0, norm)


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
class RouteTopKTrainingSAEConfig(RoutedTrainingConfig, SparseTopKTrainingConfig):
    """Training configuration of a RouteSAE with TopK; the defaults are the paper's."""


class RouteTopKTrainingSAE(RoutedTrainingSAE, SparseTopKTrainingSAE):
    """A RouteSAE with TopK, for training."""

    cfg: RouteTopKTrainingSAEConfig  # type: ignore[assignment]


@dataclass
class RouteJumpReLUSAEConfig(RoutedConfig, JumpReLUSAEConfig):
    """A RouteSAE with JumpReLU; what batchtopk and matryoshka_batchtopk are saved as, too."""


class RouteJumpReLUSAE(RoutedSAE, JumpReLUSAE):
    """A RouteSAE with JumpReLU, for inference."""

    cfg: RouteJumpReLUSAEConfig  # type: ignore[assignment]


@dataclass(kw_only=True)
class RouteJumpReLUTrainingSAEConfig(RoutedTrainingConfig, JumpReLUTrainingSAEConfig):
    """Training configuration of a RouteSAE with JumpReLU.

    Args:
        l0_coefficient: weight of the L0 penalty against the loss. SAELens's 1.0 stands against the
            squared error; against NormMSE the same weight is 1/d.
        jumprelu_init_threshold: None means 0.05 * sqrt(d_in), which is 0.05 for inputs scaled to
            norm 1.
        jumprelu_bandwidth: None means the same.
    """

    l0_coefficient: float = 0.01
    jumprelu_init_threshold: float | None = None  # type: ignore[assignment]
    jumprelu_bandwidth: float | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        scaled = 0.05 * self.d_in**0.5
        if self.jumprelu_init_threshold is None:
            self.jumprelu_init_threshold = scaled
        if self.jumprelu_bandwidth is None:
            self.jumprelu_bandwidth = scaled
        super().__post_init__()


class RouteJumpReLUTrainingSAE(RoutedTrainingSAE, JumpReLUTrainingSAE):
    """A RouteSAE with JumpReLU, for training."""

    cfg: RouteJumpReLUTrainingSAEConfig  # type: ignore[assignment]


@dataclass
class RouteStandardSAEConfig(RoutedConfig, StandardSAEConfig):
    """A RouteSAE with ReLU."""


class RouteStandardSAE(RoutedSAE, StandardSAE):
    """A RouteSAE with ReLU, for inference."""

    cfg: RouteStandardSAEConfig  # type: ignore[assignment]


@dataclass(kw_only=True)
class RouteStandardTrainingSAEConfig(RoutedTrainingConfig, StandardTrainingSAEConfig):
    """Training configuration of a RouteSAE with ReLU and an L1 penalty.

    Args:
        l1_coefficient: weight of the L1 penalty. Under the normalised loss the penalty is divided
            by the mean norm of x_route, so the weight does not depend on d.
        l1_warm_up_steps: steps over which the weight rises from 0.
        lp_norm: which norm of the features the penalty takes; 1 is L1.
    """

    l1_coefficient: float = 0.3


class RouteStandardTrainingSAE(RoutedTrainingSAE, StandardTrainingSAE):
    """A RouteSAE with ReLU, for training."""

    cfg: RouteStandardTrainingSAEConfig  # type: ignore[assignment]


@dataclass
class RouteGatedSAEConfig(RoutedConfig, GatedSAEConfig):
    """A RouteSAE with a gated encoder."""


class RouteGatedSAE(RoutedSAE, GatedSAE):
    """A RouteSAE with a gated encoder, for inference."""

    cfg: RouteGatedSAEConfig  # type: ignore[assignment]


@dataclass(kw_only=True)
class RouteGatedTrainingSAEConfig(RoutedTrainingConfig, GatedTrainingSAEConfig):
    """Training configuration of a RouteSAE with a gated encoder.

    Args:
        l1_coefficient: weight of the L1 penalty on the gate, in the units of `route_standard`'s.
        l1_warm_up_steps: steps over which the weight rises from 0.
    """

    l1_coefficient: float = 0.3


class RouteGatedTrainingSAE(RoutedTrainingSAE, GatedTrainingSAE):
    """A RouteSAE with a gated encoder, for training."""

    cfg: RouteGatedTrainingSAEConfig  # type: ignore[assignment]


@dataclass(kw_only=True)
class RouteBatchTopKTrainingSAEConfig(RoutedTrainingConfig, BatchTopKTrainingSAEConfig):
    """Training configuration of a RouteSAE with BatchTopK."""

    k: float = 64  # type: ignore[assignment]
    aux_loss_coefficient: float = 0.0
    rescale_acts_by_decoder_norm: bool = False


class RouteBatchTopKTrainingSAE(RoutedTrainingSAE, BatchTopKTrainingSAE):
    """A RouteSAE with BatchTopK, for training; saved as `route_jumprelu`."""

    cfg: RouteBatchTopKTrainingSAEConfig  # type: ignore[assignment]


@dataclass(kw_only=True)
class RouteMatryoshkaBatchTopKTrainingSAEConfig(
    RoutedTrainingConfig, MatryoshkaBatchTopKTrainingSAEConfig
):
    """Training configuration of a RouteSAE with nested BatchTopK dictionaries.

    Args:
        matryoshka_widths: sizes of the nested dictionaries, ascending; an empty list means an
            eighth, a quarter, a half and all of d_sae.
    """

    k: float = 64  # type: ignore[assignment]
    aux_loss_coefficient: float = 0.0
    rescale_acts_by_decoder_norm: bool = False
    matryoshka_widths: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.matryoshka_widths:
            self.matryoshka_widths = [max(1, self.d_sae // n) for n in (8, 4, 2, 1)]


class RouteMatryoshkaBatchTopKTrainingSAE(RoutedTrainingSAE, MatryoshkaBatchTopKTrainingSAE):
    """A RouteSAE with nested BatchTopK dictionaries, for training; saved as `route_jumprelu`."""

    cfg: RouteMatryoshkaBatchTopKTrainingSAEConfig  # type: ignore[assignment]


def to_inference(training_sae: TrainingSAE[Any]) -> SAE[Any]:
    """A trained SAE as saving and loading would give it back."""
    config = training_sae.cfg.get_inference_sae_cfg_dict()
    weights = _inference_weights(training_sae)
    if isinstance(training_sae, RoutedTrainingSAE) and training_sae.cfg.decoder_norm_interval > 0:
        weights["W_dec"] = _unit_rows(weights["W_dec"])
    return _built(config, weights)


def as_routed(training_sae: TrainingSAE[Any]) -> SAE[Any]:
    """An SAELens SAE trained on n(x) of one layer, as the RouteSAE with that one routed layer.

    With a single layer to choose, p is 1 and x_route is n(x), so whatever takes a RouteSAE takes
    the SAE, and the normalisation goes with it.

    Raises:
        ValueError: SAELens's architecture has no routed counterpart.
    """
    config = training_sae.cfg.get_inference_sae_cfg_dict()
    architecture = f"route_{config['architecture']}"
    if architecture not in SAE_CLASS_REGISTRY:
        raise ValueError(f"{config['architecture']!r} has no routed counterpart {architecture!r}")
    weights = _inference_weights(training_sae)
    W_router = torch.zeros(training_sae.cfg.d_in, 1, dtype=training_sae.dtype)
    weights["W_router"] = W_router.to(training_sae.device)
    return _built({**config, "architecture": architecture, "n_routed_layers": 1}, weights)


def _inference_weights(training_sae: TrainingSAE[Any]) -> dict[str, Tensor]:
    weights = {name: value.detach().clone() for name, value in training_sae.state_dict().items()}
    training_sae.process_state_dict_for_saving_inference(weights)
    return weights


def _built(config: dict[str, Any], weights: dict[str, Tensor]) -> SAE[Any]:
    sae = SAE.from_dict(config)
    sae.process_state_dict_for_loading(weights)
    sae.load_state_dict(weights)
    return sae.to(config["device"])


def register(
    training_sae: type[TrainingSAE],
    training_config: type[TrainingSAEConfig],
    sae: type[SAE] | None = None,
    config: type[SAEConfig] | None = None,
) -> None:
    """Make SAELens know an architecture; again after an autoreload, without its error.

    Without `sae` and `config`, the architecture is saved as another one's.
    """
    architecture = training_config.architecture()
    SAE_TRAINING_CLASS_REGISTRY.pop(architecture, None)
    if sae is not None and config is not None:
        # the training config looks its inference class up, so that one goes first
        SAE_CLASS_REGISTRY.pop(architecture, None)
        register_sae_class(architecture, sae, config)
    register_sae_training_class(architecture, training_sae, training_config)


register(RouteTopKTrainingSAE, RouteTopKTrainingSAEConfig, RouteTopKSAE, RouteTopKSAEConfig)
register(
    RouteJumpReLUTrainingSAE,
    RouteJumpReLUTrainingSAEConfig,
    RouteJumpReLUSAE,
    RouteJumpReLUSAEConfig,
)
register(
    RouteStandardTrainingSAE,
    RouteStandardTrainingSAEConfig,
    RouteStandardSAE,
    RouteStandardSAEConfig,
)
register(RouteGatedTrainingSAE, RouteGatedTrainingSAEConfig, RouteGatedSAE, RouteGatedSAEConfig)
register(RouteBatchTopKTrainingSAE, RouteBatchTopKTrainingSAEConfig)
register(RouteMatryoshkaBatchTopKTrainingSAE, RouteMatryoshkaBatchTopKTrainingSAEConfig)
