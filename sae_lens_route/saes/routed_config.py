"""Configuration fields that make a SAELens SAE a RouteSAE, and what is checked about them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from sae_lens.registry import get_sae_class
from sae_lens.saes.sae import SAEConfig
from typing_extensions import override

from sae_lens_route.errors import UserError
from sae_lens_route.saes.decoder_bias import BDecInit
from sae_lens_route.saes.loss import LossName
from sae_lens_route.saes.router import Aggregation, RoutingMode
from sae_lens_route.saes.streams import StreamsConfigMixin, TrainingConfigBase, require_choice

RouterObjective = Literal["reconstruction", "assignment", "frozen"]


@dataclass
class RoutedConfigMixin(StreamsConfigMixin):
    """Routing options, added to a SAELens configuration.

    Args:
        n_routed_layers: L, how many residual streams the router chooses from.
        routing: "hard" (one block per token, scaled by its probability), "soft" (the mixture) or
            "uniform" (a block drawn at random, the paper's Random baseline).
        aggregation: how the streams are pooled for the router: "sum", "mean" or "attention".
        scale_by_probability: whether hard routing scales the chosen stream by its probability p
            (Eq. 9). Without it x_route is n(x) and activations mean the same at every token.
        routing_seed: seed of the uniform draw.
        route_shares: share of the tokens that uniform routing sends to each routed block, summing
            to 1; None means equal shares. With a trained router's shares it is the random router
            that one is compared with.
        layer_shares: name of route_shares in a `cfg.json` from before 0.1.0; do not set.
    """

    routing: RoutingMode = "hard"
    aggregation: Aggregation = "sum"
    scale_by_probability: bool = True
    routing_seed: int = 0
    route_shares: list[float] | None = None
    layer_shares: list[float] | None = field(default=None, repr=False)

    @override
    @classmethod
    def architecture(cls) -> str:
        return f"route_{super().architecture()}"  # type: ignore[safe-super]

    def __post_init__(self) -> None:
        if self.layer_shares is not None:
            self.route_shares, self.layer_shares = self.layer_shares, None
        super().__post_init__()
        require_choice("routing", self.routing, get_args(RoutingMode))
        require_choice("aggregation", self.aggregation, get_args(Aggregation))
        if self.route_shares is not None:
            self.route_shares = [float(share) for share in self.route_shares]
            self._check_route_shares(self.route_shares)

    @override
    def to_dict(self) -> dict[str, Any]:
        return _without_old_names(super().to_dict())

    def _check_route_shares(self, shares: list[float]) -> None:
        if self.routing != "uniform":
            raise UserError(
                f"route_shares={shares}: only routing='uniform' draws blocks, not {self.routing!r}"
            )
        sums_to_one = abs(sum(shares) - 1) <= 1e-3  # False for NaN
        if len(shares) != self.n_routed_layers or min(shares) < 0 or not sums_to_one:
            raise UserError(
                f"route_shares={shares}: give one share >= 0 for each of the "
                f"{self.n_routed_layers} routed blocks, summing to 1"
            )


def _without_old_names(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != "layer_shares"}


@dataclass(kw_only=True)
class RoutedTrainingConfigMixin(RoutedConfigMixin, TrainingConfigBase):
    """Training options of a RouteSAE, added to a SAELens training configuration.

    Args:
        loss: "normalized_mse" (Eq. 12 as the paper's code computes it, independent of the scale of
            p) or "mse" (Eq. 12 as printed; it rewards the router for shrinking p).
        router_objective: "reconstruction" trains the router through p in the loss, as the paper
            does. "assignment" trains it to predict where each token is reconstructed best when
            every block gets the same load (`assignment.py`). "frozen" keeps its random
            initialization.
        scale_by_probability: None scales unless the objective is "assignment", which needs no
            gradient through p.
        b_dec_init: what `b_dec` is set to before the first step: the "mean" or "geometric_median"
            (Gao et al. 2024) of the first batch's x_route, or "zeros", as in the paper's code.
        latent_bias: whether `b_enc` is trained, as in the paper's code, or stays 0, as in its
            Eq. 10.
        decoder_norm_interval: decoder rows are set to unit norm before the first step, after steps
            0, N, 2N, ... and before saving; 0 never does.
        decoder_init_norm: None initializes as the reference does (encoder uniform within 1/sqrt(d),
            decoder its transpose with unit rows); a number is SAELens's initialization.
    """

    loss: LossName = "normalized_mse"
    router_objective: RouterObjective = "reconstruction"
    scale_by_probability: bool | None = None  # type: ignore[assignment]
    b_dec_init: BDecInit = "mean"
    latent_bias: bool = True
    decoder_norm_interval: int = 10
    decoder_init_norm: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("loss", self.loss, get_args(LossName))
        require_choice("router_objective", self.router_objective, get_args(RouterObjective))
        require_choice("b_dec_init", self.b_dec_init, get_args(BDecInit))
        if self.scale_by_probability is None:
            self.scale_by_probability = self.router_objective != "assignment"
        self._check_scale(self.scale_by_probability)
        if self.router_objective == "assignment" and self.routing != "hard":
            raise UserError(
                f"router_objective='assignment': routing={self.routing!r} does not send each token "
                "to one block of the router's choice; it must be 'hard'"
            )
        if not self.latent_bias and "gated" in self.architecture():
            raise UserError(f"latent_bias=False: {self.architecture()} has no b_enc to hold at 0")
        if self.decoder_norm_interval < 0:
            raise UserError(f"decoder_norm_interval={self.decoder_norm_interval}: must be >= 0")

    def _check_scale(self, scales: bool) -> None:
        learns_through_p = self.routing != "uniform" and self.router_objective == "reconstruction"
        if not scales and (learns_through_p or self.routing == "soft"):
            raise UserError(
                f"scale_by_probability=False: with routing={self.routing!r} and router_objective="
                f"{self.router_objective!r} the router learns only through p; leave it out, or set "
                "router_objective='assignment' or 'frozen'"
            )

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        base = super().get_inference_config_class()
        if issubclass(base, RoutedConfigMixin):
            return base
        # SAELens saves some architectures as another (batchtopk as jumprelu): route that one
        return get_sae_class(f"route_{base.architecture()}")[1]

    @override
    def get_inference_sae_cfg_dict(self) -> dict[str, Any]:
        return _without_old_names(super().get_inference_sae_cfg_dict())
