"""The crosscoder, one of the baselines of the paper (Lindsey et al. 2024, "Sparse Crosscoders").

A crosscoder is an ordinary SAELens SAE on the normalised residual streams of L blocks, one after
the other in one vector:

    h = [n(x_1), ..., n(x_L)]                        [L*d]
    z = ReLU(h @ W_enc + b_enc)                      W_enc [L*d, M]: an encoder per layer, summed
    h_hat = z @ W_dec + b_dec                        W_dec [M, L*d]: a decoder per layer

So `StackedSAE` and `StackedTrainingSAE` are mixins that add `stack` (streams to h) and `unstack`
(h back to streams) to a SAELens class; `encode` and `decode` keep working on h `[..., L*d]`, what
SAELens's tools find at the crosscoder's hook. Training takes batches `[tokens, L, d]`, as RouteSAEs
do. There is an architecture with ReLU and L1 ("crosscoder") and one with TopK ("crosscoder_topk").

The loss is NormMSE averaged over layers. It is `normalized_mse` of h, because every n(x_i) has the
same squared norm, d - 1 (up to the 1e-6 in the scale). In shapes, Ld stands for L*d.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from einops import rearrange
from jaxtyping import Float
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
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig, TopKTrainingSAE
from torch import Tensor
from typing_extensions import override

from sae_lens_route.router import RoutingMode, normalize
from sae_lens_route.saes import (
    RouteTopKSAEConfig,
    RouteTopKTrainingSAE,
    RouteTopKTrainingSAEConfig,
    normalized_mse,
    register,
)
from sae_lens_route.sparse_topk import SparseTopKTrainingConfig, SparseTopKTrainingSAE

L1Norm = Literal["decoder", "none"]

if TYPE_CHECKING:  # what the mixins are mixed into
    _ConfigBase, _TrainingConfigBase = SAEConfig, TrainingSAEConfig
    _Base, _TrainingBase = SAE[Any], TrainingSAE[Any]
else:
    _ConfigBase = _TrainingConfigBase = _Base = _TrainingBase = object


@dataclass
class StackedConfig(_ConfigBase):
    """What makes a SAELens configuration a crosscoder's.

    Args:
        n_routed_layers: L, how many residual streams are read and written.
        d_in: L times the model's width.
        normalize_activations: "none": every layer is normalised per token already.
    """

    n_routed_layers: int = 9

    @override
    @classmethod
    def architecture(cls) -> str:
        base = super().architecture()  # type: ignore[safe-super]
        return "crosscoder" if base == "standard" else f"crosscoder_{base}"

    @property
    def d_model(self) -> int:
        """Width of one residual stream."""
        return self.d_in // self.n_routed_layers

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_routed_layers < 1:
            raise ValueError(f"n_routed_layers={self.n_routed_layers}: at least one is needed")
        if self.d_in % self.n_routed_layers:
            raise ValueError(
                f"d_in={self.d_in}: must be n_routed_layers={self.n_routed_layers} times the "
                "model's width"
            )
        if self.normalize_activations != "none":
            raise ValueError(
                f"normalize_activations={self.normalize_activations!r}: a crosscoder normalises "
                "every layer per token already, so it must be 'none'"
            )
        if self.reshape_activations != "none":
            raise ValueError(
                f"reshape_activations={self.reshape_activations!r}: must be 'none', a crosscoder "
                "reads residual streams"
            )
        k = getattr(self, "k", None)
        if k is not None and not 0 < k <= self.d_sae:
            raise ValueError(f"k={k}: must be between 1 and d_sae={self.d_sae}")


class StackedSAE(_Base):
    """Adds `stack` and `unstack` to a SAELens SAE; goes before it in the bases."""

    cfg: Any

    def stack(self, x: Float[Tensor, "... L d"]) -> Float[Tensor, "... Ld"]:
        """h of residual streams, one per layer and in order: normalised, one after the other.

        Raises:
            ValueError: the last two axes are not `[n_routed_layers, d_model]`.
        """
        expected = (self.cfg.n_routed_layers, self.cfg.d_model)
        if tuple(x.shape[-2:]) != expected:
            raise ValueError(
                f"stack takes [..., n_routed_layers, d_model] = [..., {expected[0]}, "
                f"{expected[1]}], got {list(x.shape)}"
            )
        return rearrange(normalize(x.to(self.dtype)), "... L d -> ... (L d)")

    def unstack(
        self,
        h: Float[Tensor, "... Ld"],
        mean: Float[Tensor, "... L"],
        scale: Float[Tensor, "... L"],
    ) -> Float[Tensor, "... L d"]:
        """Residual streams of h, given their mean and scale (`router.normalization_stats`)."""
        layers = rearrange(h, "... (L d) -> ... L d", L=self.cfg.n_routed_layers)
        return layers * scale.unsqueeze(-1) + mean.unsqueeze(-1)

    def encode_layers(self, x: Float[Tensor, "... L d"]) -> Float[Tensor, "... d_sae"]:
        """Feature activations of residual streams: stack, then encode."""
        return self.encode(self.stack(x))

    def decoder_layer_norms(self) -> Float[Tensor, "d_sae L"]:
        """Norm of every feature's decoder in each layer: where the feature is written."""
        layers = rearrange(self.W_dec, "d_sae (L d) -> d_sae L d", L=self.cfg.n_routed_layers)
        return layers.norm(dim=-1)


@dataclass(kw_only=True)
class StackedTrainingConfig(StackedConfig, _TrainingConfigBase):
    """Training options of a crosscoder, added to a SAELens training configuration.

    Args:
        decoder_init_norm: norm at the start of a decoder row, over all layers together; the encoder
            starts as the decoder's transpose. Lindsey et al. start smaller, as SAELens does (0.1),
            which takes many more steps to get going.
    """

    decoder_init_norm: float | None = 1.0


class StackedTrainingSAE(StackedSAE, _TrainingBase):
    """Adds stacking to a SAELens training SAE; `sae_in` of a step is `[tokens, L, d]`."""

    def __init__(self, cfg: Any, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self.mse_loss_fn = normalized_mse

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One step on residual streams; the output's `sae_in` and `sae_out` are `[tokens, L*d]`."""
        if getattr(self.cfg, "aux_loss_coefficient", None) == 0:
            # without a mask SAELens skips the auxiliary loss, and the count that stalls a GPU
            step_input = replace(step_input, dead_neuron_mask=None)
        stacked = replace(step_input, sae_in=self.stack(step_input.sae_in))
        return super().training_forward_pass(stacked)


@dataclass
class CrosscoderConfig(StackedConfig, StandardSAEConfig):
    """A crosscoder with ReLU; no bias is taken off its input."""

    apply_b_dec_to_input: bool = False


class Crosscoder(StackedSAE, StandardSAE):
    """A crosscoder with ReLU, for inference.

    `fold_W_dec_norm` gives every decoder row norm 1 over all layers and leaves the function as it
    was.
    """

    cfg: CrosscoderConfig  # type: ignore[assignment]


@dataclass(kw_only=True)
class TrainingCrosscoderConfig(StackedTrainingConfig, StandardTrainingSAEConfig):
    """Training configuration of a crosscoder with ReLU.

    Args:
        l1_coefficient: weight of the sparsity penalty beside NormMSE. Measured on the demo model (9
            layers of width 128, d_sae 1024, 200k tokens, one seed), active features on held-out
            text: 43 at 1e-3, 18 at 1.4e-3, 14 at 1.5e-3. Latents grow with `sqrt(L*d)`, so wider
            models need less, by about that factor.
        l1_warm_up_steps: steps over which the coefficient rises from 0. Worth using: over a quarter
            of those runs' steps, 2e-3 gives 18 active features too, with NormMSE .318, not .378.
        l1_norm: "decoder": the penalty is `sum_j z_j sum_i ||W_dec[j, layer i]||`, mean over
            tokens, so that a feature pays for every layer it is written to (Lindsey et al.).
            "none": the mean of the latents over tokens and features, as the paper's code has it;
            the decoder can evade it by growing. Its coefficients are larger, by about d_sae times
            the norms: 6 gives 7 active features there, 3 gives 49. (That code has no b_dec; here
            it stays.)
        lp_norm: 1, the only penalty there is.
    """

    apply_b_dec_to_input: bool = False
    l1_coefficient: float = 1.5e-3
    l1_norm: L1Norm = "decoder"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.l1_norm not in get_args(L1Norm):
            choices = ", ".join(map(repr, get_args(L1Norm)))
            raise ValueError(f"l1_norm={self.l1_norm!r}: must be one of {choices}")
        if self.l1_coefficient < 0:
            raise ValueError(f"l1_coefficient={self.l1_coefficient}: must be >= 0")
        if self.lp_norm != 1:
            raise ValueError(f"lp_norm={self.lp_norm}: must be 1, a crosscoder's penalty is an L1")


class TrainingCrosscoder(StackedTrainingSAE, StandardTrainingSAE):
    """A crosscoder with ReLU, for training.

    Decoder rows are never rescaled: the penalty weighs their norms.
    """

    cfg: TrainingCrosscoderConfig  # type: ignore[assignment]

    @override
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Float[Tensor, "tokens d_sae"],
        hidden_pre: Float[Tensor, "tokens d_sae"],
        sae_out: Float[Tensor, "tokens Ld"],
    ) -> dict[str, Tensor]:
        """The sparsity penalty, `l1_loss`; `l1_norm` says which."""
        if self.cfg.l1_norm == "decoder":
            penalty = (feature_acts @ self.decoder_layer_norms().sum(-1)).mean()
        else:
            penalty = feature_acts.mean()
        return {"l1_loss": step_input.coefficients["l1"] * penalty}


@dataclass
class TopKCrosscoderConfig(StackedConfig, TopKSAEConfig):
    """A crosscoder with TopK."""

    k: int = 64


class TopKCrosscoder(StackedSAE, TopKSAE):
    """A crosscoder with TopK, for inference."""

    cfg: TopKCrosscoderConfig  # type: ignore[assignment]


@dataclass(kw_only=True)
class TopKTrainingCrosscoderConfig(StackedTrainingConfig, SparseTopKTrainingConfig):
    """Training configuration of a crosscoder with TopK.

    No auxiliary loss and no rescaling, as for RouteSAEs. There is no `decoder_norm_interval`: with
    `rescale_acts_by_decoder_norm=True` SAELens trains as if the rows had norm 1 (over all layers),
    and saves them so.
    """


class TopKTrainingCrosscoder(StackedTrainingSAE, SparseTopKTrainingSAE):
    """A crosscoder with TopK, for training."""

    cfg: TopKTrainingCrosscoderConfig  # type: ignore[assignment]


@dataclass(kw_only=True)
class MultiLayerTopKTrainingConfig(RouteTopKTrainingSAEConfig):
    """Training configuration of a multi-layer SAE with TopK (Lawson et al. 2024, MLSAE).

    Saved as a RouteSAE with uniform routing, which reads one random layer of each token: what it is
    evaluated as.
    """

    routing: RoutingMode = "uniform"

    @override
    @classmethod
    def architecture(cls) -> str:
        return "multi_layer_topk"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.routing != "uniform":
            raise ValueError(
                f"routing={self.routing!r}: a multi-layer SAE has no router; it must be 'uniform'"
            )

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return RouteTopKSAEConfig


class MultiLayerTopKTrainingSAE(RouteTopKTrainingSAE):
    """One dictionary for the normalised residual streams of all L layers, L vectors per token.

    A step encodes all of them, so it costs L times a RouteSAE's.
    """

    cfg: MultiLayerTopKTrainingConfig  # type: ignore[assignment]

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One step on residual streams; the output's tensors have `tokens * L` rows."""
        step_input = self.begin_step(step_input)
        streams = normalize(step_input.sae_in.to(self.dtype))
        every_layer = rearrange(streams, "tokens L d -> (tokens L) d")
        return TopKTrainingSAE.training_forward_pass(self, replace(step_input, sae_in=every_layer))


register(TrainingCrosscoder, TrainingCrosscoderConfig, Crosscoder, CrosscoderConfig)
register(TopKTrainingCrosscoder, TopKTrainingCrosscoderConfig, TopKCrosscoder, TopKCrosscoderConfig)
register(MultiLayerTopKTrainingSAE, MultiLayerTopKTrainingConfig)
