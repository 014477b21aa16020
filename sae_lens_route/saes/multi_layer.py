"""The multi-layer SAE, one of the baselines (Lawson et al. 2024, "Multi-Layer SAEs", MLSAE).

One dictionary is trained on the normalized residual streams of all L blocks, L vectors per token.
It has no router. Saved, it is a RouteSAE with uniform routing, which reads one random stream of
each token: that is what it is evaluated as.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from einops import rearrange
from sae_lens.saes.sae import SAEConfig, TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopKTrainingSAE
from typing_extensions import override

from sae_lens_route.errors import UserError
from sae_lens_route.saes.architectures import (
    RouteTopKSAEConfig,
    RouteTopKTrainingSAE,
    RouteTopKTrainingSAEConfig,
)
from sae_lens_route.saes.decoder_bias import initialize_b_dec
from sae_lens_route.saes.metadata import route_names
from sae_lens_route.saes.router import RoutingMode, normalize


@dataclass(kw_only=True)
class MultiLayerTopKTrainingConfig(RouteTopKTrainingSAEConfig):
    """Training configuration of a multi-layer SAE with TopK; saved as `route_topk`."""

    routing: RoutingMode = "uniform"

    @override
    @classmethod
    def architecture(cls) -> str:
        return "multi_layer_topk"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.routing != "uniform":
            raise UserError(
                f"routing={self.routing!r}: a multi-layer SAE has no router; it must be 'uniform'"
            )

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return RouteTopKSAEConfig


class MultiLayerTopKTrainingSAE(RouteTopKTrainingSAE):
    """A multi-layer SAE with TopK, for training. A step costs L times that of a RouteSAE."""

    cfg: MultiLayerTopKTrainingConfig  # type: ignore[assignment]

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One step on residual streams; the output's tensors have `tokens * L` rows.

        The route metrics are those of equal shares: every block has 1/L of the rows.
        """
        step_input = self.begin_step(step_input)
        streams = normalize(step_input.sae_in.to(self.dtype))
        rows = rearrange(streams, "tokens L d -> (tokens L) d")
        if step_input.n_training_steps == 0:
            initialize_b_dec(self.b_dec, self.cfg.b_dec_init, rows)
        output = TopKTrainingSAE.training_forward_pass(self, replace(step_input, sae_in=rows))
        n_routes = self.cfg.n_routed_layers
        output.metrics.update({f"route_share/{name}": 1 / n_routes for name in route_names(self)})
        output.metrics.update({"route_weight": 1.0, "route_entropy": math.log(n_routes)})
        return output
