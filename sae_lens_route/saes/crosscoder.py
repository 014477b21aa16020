"""The crosscoder, one of the baselines of the paper (Lindsey et al. 2024, "Sparse Crosscoders").

A crosscoder is an ordinary SAELens SAE on the normalized residual streams of L blocks, concatenated
to one vector:

    h = [n(x_1), ..., n(x_L)]                        [L*d]
    z = ReLU(h @ W_enc + b_enc)                      W_enc [L*d, M]: an encoder per block, summed
    h_hat = z @ W_dec + b_dec                        W_dec [M, L*d]: a decoder per block

`CrosscoderSAEMixin` adds `concat_blocks` (streams to h) and `split_blocks` (h back to streams) to a
SAELens class; `encode` and `decode` take h `[..., L*d]`, which is what SAELens's tools find at the
crosscoder's hook. Training takes batches `[tokens, L, d]`, as for RouteSAEs. There is an
architecture with ReLU and L1 ("crosscoder") and one with TopK ("crosscoder_topk").

The loss is NormMSE averaged over blocks. It is `normalized_mse` of h, because every n(x_i) has the
same squared norm, d - 1 (up to the 1e-6 in the scale). In shapes, Ld stands for L*d.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from einops import rearrange
from jaxtyping import Float
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.saes.standard_sae import (
    StandardSAE,
    StandardSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
)
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from torch import Tensor
from typing_extensions import override

from sae_lens_route.errors import UserError
from sae_lens_route.saes.decoder_bias import BDecInit, initialize_b_dec
from sae_lens_route.saes.loss import normalized_mse
from sae_lens_route.saes.router import normalize
from sae_lens_route.saes.sparse_topk import SparseTopKTrainingConfig, SparseTopKTrainingSAE
from sae_lens_route.saes.streams import (
    StreamsConfigMixin,
    StreamsSAEMixin,
    StreamsTrainingSAEMixin,
    TrainingConfigBase,
    require_choice,
    without_unused_mask,
)

L1Norm = Literal["decoder", "none"]


@dataclass
class CrosscoderConfigMixin(StreamsConfigMixin):
    """Makes a SAELens configuration that of a crosscoder.

    Args:
        n_routed_layers: L, how many residual streams are read and written.
        d_in: L times the model's width.
    """

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
        if self.d_in % self.n_routed_layers:
            raise UserError(
                f"d_in={self.d_in}: must be n_routed_layers={self.n_routed_layers} times the "
                "model's width"
            )


class CrosscoderSAEMixin(StreamsSAEMixin):
    """Adds `concat_blocks` and `split_blocks` to a SAELens SAE; precedes it among the bases."""

    cfg: Any

    def concat_blocks(self, x: Float[Tensor, "... L d"]) -> Float[Tensor, "... Ld"]:
        """h: the residual streams, one per block and in order, normalized and concatenated.

        Raises:
            UserError: the last two axes are not `[n_routed_layers, d_model]`.
        """
        expected = (self.cfg.n_routed_layers, self.cfg.d_model)
        if tuple(x.shape[-2:]) != expected:
            raise UserError(
                f"concat_blocks takes [..., n_routed_layers, d_model] = [..., {expected[0]}, "
                f"{expected[1]}], got {list(x.shape)}"
            )
        return rearrange(normalize(x.to(self.dtype)), "... L d -> ... (L d)")

    def split_blocks(
        self,
        h: Float[Tensor, "... Ld"],
        mean: Float[Tensor, "... L"],
        scale: Float[Tensor, "... L"],
    ) -> Float[Tensor, "... L d"]:
        """Residual streams of h, given their mean and scale (`router.normalization_stats`)."""
        streams = rearrange(h, "... (L d) -> ... L d", L=self.cfg.n_routed_layers)
        return streams * scale.unsqueeze(-1) + mean.unsqueeze(-1)

    def encode_layers(self, x: Float[Tensor, "... L d"]) -> Float[Tensor, "... d_sae"]:
        """Feature activations of residual streams: concatenate, then encode."""
        return self.encode(self.concat_blocks(x))

    def decoder_block_norms(self) -> Float[Tensor, "d_sae L"]:
        """Norm of every feature's decoder in each block: where the feature is written."""
        by_block = rearrange(self.W_dec, "d_sae (L d) -> d_sae L d", L=self.cfg.n_routed_layers)
        return by_block.norm(dim=-1)


@dataclass(kw_only=True)
class CrosscoderTrainingConfigMixin(CrosscoderConfigMixin, TrainingConfigBase):
    """Training options of a crosscoder, added to a SAELens training configuration.

    Args:
        decoder_init_norm: initial norm of a decoder row, over all blocks together; the encoder is
            initialized as the decoder's transpose. Lindsey et al. use a smaller one, as SAELens
            does (0.1), with which training takes many more steps to get going.
        b_dec_init: what `b_dec` is set to before the first step: "zeros", or the "mean" or
            "geometric_median" of the first batch's h. Where `b_dec` is also subtracted from the
            input, the mean is the default.
    """

    decoder_init_norm: float | None = 1.0
    b_dec_init: BDecInit = "zeros"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("b_dec_init", self.b_dec_init, get_args(BDecInit))


class CrosscoderTrainingSAEMixin(CrosscoderSAEMixin, StreamsTrainingSAEMixin):
    """Adds concatenation to a SAELens training SAE; `sae_in` of a step is `[tokens, L, d]`."""

    def __init__(self, cfg: Any, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self.mse_loss_fn = normalized_mse

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One step on residual streams; the output's `sae_in` and `sae_out` are `[tokens, L*d]`."""
        h = self.concat_blocks(step_input.sae_in)
        if step_input.n_training_steps == 0:
            initialize_b_dec(self.b_dec, self.cfg.b_dec_init, h)
        step_input = replace(without_unused_mask(step_input, self.cfg), sae_in=h)
        return super().training_forward_pass(step_input)


@dataclass
class CrosscoderConfig(CrosscoderConfigMixin, StandardSAEConfig):
    """A crosscoder with ReLU; no bias is subtracted from its input."""

    apply_b_dec_to_input: bool = False


class Crosscoder(CrosscoderSAEMixin, StandardSAE):
    """A crosscoder with ReLU, for inference.

    `fold_W_dec_norm` gives every decoder row norm 1 over all blocks without changing the function.
    """

    cfg: CrosscoderConfig  # type: ignore[assignment]


@dataclass(kw_only=True)
class TrainingCrosscoderConfig(CrosscoderTrainingConfigMixin, StandardTrainingSAEConfig):
    """Training configuration of a crosscoder with ReLU.

    Args:
        l1_coefficient: weight of the sparsity penalty relative to NormMSE. On the demo model (9
            blocks of width 128, d_sae 1024, 200k tokens, one seed), active features on held-out
            text: 43 at 1e-3, 18 at 1.4e-3, 14 at 1.5e-3. Latents grow with `sqrt(L*d)`, so wider
            models need less, by about that factor.
        l1_warm_up_steps: steps over which the coefficient rises from 0. Worth using: over a quarter
            of those runs' steps, 2e-3 also leads to 18 active features, with NormMSE .318, not
            .378.
        l1_norm: "decoder": the penalty is `sum_j z_j sum_i ||W_dec[j, block i]||`, mean over
            tokens, so that a feature pays for every block it is written to (Lindsey et al.).
            "none": the mean of the latents over tokens and features, as in the paper's code; the
            decoder can evade it by growing. Its coefficients are larger, by about d_sae times the
            norms: 6 leads to 7 active features on the demo model, 3 to 49. (The paper's code has no
            b_dec; it is kept here.)
        lp_norm: 1, the only choice.
    """

    apply_b_dec_to_input: bool = False
    l1_coefficient: float = 1.5e-3
    l1_norm: L1Norm = "decoder"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("l1_norm", self.l1_norm, get_args(L1Norm))
        if self.l1_coefficient < 0:
            raise UserError(f"l1_coefficient={self.l1_coefficient}: must be >= 0")
        if self.lp_norm != 1:
            raise UserError(
                f"lp_norm={self.lp_norm}: must be 1, the penalty of a crosscoder is an L1 norm"
            )


class TrainingCrosscoder(CrosscoderTrainingSAEMixin, StandardTrainingSAE):
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
        """The sparsity penalty `l1_loss`, of the kind that `l1_norm` names."""
        if self.cfg.l1_norm == "decoder":
            penalty = (feature_acts @ self.decoder_block_norms().sum(-1)).mean()
        else:
            penalty = feature_acts.mean()
        return {"l1_loss": step_input.coefficients["l1"] * penalty}


@dataclass
class TopKCrosscoderConfig(CrosscoderConfigMixin, TopKSAEConfig):
    """A crosscoder with TopK."""

    k: int = 64


class TopKCrosscoder(CrosscoderSAEMixin, TopKSAE):
    """A crosscoder with TopK, for inference."""

    cfg: TopKCrosscoderConfig  # type: ignore[assignment]


@dataclass(kw_only=True)
class TopKTrainingCrosscoderConfig(CrosscoderTrainingConfigMixin, SparseTopKTrainingConfig):
    """Training configuration of a crosscoder with TopK.

    No auxiliary loss and no rescaling, as for RouteSAEs. There is no `decoder_norm_interval`: with
    `rescale_acts_by_decoder_norm=True` SAELens trains as if the rows had norm 1 (over all blocks),
    and saves them with norm 1.
    """

    k: int = 64
    b_dec_init: BDecInit = "mean"
    aux_loss_coefficient: float = 0.0
    rescale_acts_by_decoder_norm: bool = False


class TopKTrainingCrosscoder(CrosscoderTrainingSAEMixin, SparseTopKTrainingSAE):
    """A crosscoder with TopK, for training."""

    cfg: TopKTrainingCrosscoderConfig  # type: ignore[assignment]
