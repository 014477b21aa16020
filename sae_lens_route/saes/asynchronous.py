"""Training steps that never wait for the device: what SAELens's classes read back, done without.

A step that is not logged then reads nothing from the device and copies nothing to it. The threshold
of BatchTopK is bit-identical to SAELens's. The losses for dead features (`aux_loss_coefficient`,
`pre_act_loss_coefficient`; both off by default) are equal to SAELens's up to rounding: SAELens asks
for the number of dead features, which is the size of a top-k, and here the top-k always has the
largest size that this can be. On the CPU, where nothing is waited for, SAELens's own methods run:
they skip the loss while no feature is dead.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.topk_sae import TopKTrainingSAE, calculate_topk_aux_acts
from torch import Tensor
from typing_extensions import override


class AsynchronousTopK(TopKTrainingSAE):
    """SAELens's TopK training SAE, which does not ask how many features are dead."""

    @override
    def calculate_topk_aux_loss(
        self,
        sae_in: Float[Tensor, "tokens d_in"],
        sae_out: Float[Tensor, "tokens d_in"],
        hidden_pre: Float[Tensor, "tokens d_sae"],
        dead_neuron_mask: Bool[Tensor, " d_sae"] | None,
    ) -> Float[Tensor, ""]:
        if dead_neuron_mask is None:
            return sae_out.new_zeros(())
        if dead_neuron_mask.device.type == "cpu":
            return super().calculate_topk_aux_loss(sae_in, sae_out, hidden_pre, dead_neuron_mask)
        error = (sae_in - sae_out).detach()
        loss = dead_feature_loss(error, hidden_pre, dead_neuron_mask, self.aux_decoder())
        return self.cfg.aux_loss_coefficient * loss

    def aux_decoder(self) -> Float[Tensor, "d_sae d_in"]:
        """The decoder rows that dead features reconstruct the error with."""
        if self.cfg.rescale_acts_by_decoder_norm:
            return self.W_dec / self.W_dec.norm(dim=-1, keepdim=True)
        return self.W_dec


class AsynchronousBatchTopK(AsynchronousTopK, BatchTopKTrainingSAE):
    """SAELens's BatchTopK training SAE, which does not ask whether any feature is active either."""

    cfg: BatchTopKTrainingSAEConfig  # type: ignore[assignment]

    @override
    @torch.no_grad()
    def update_topk_threshold(self, acts_topk: Float[Tensor, "... d_sae"]) -> None:
        """Move the threshold towards the batch's least positive activation, if there is one."""
        rate, before = self.cfg.topk_threshold_lr, self.topk_threshold
        is_active = acts_topk > 0
        least = acts_topk.masked_fill(~is_active, torch.inf).min().to(before.dtype)
        self.topk_threshold = torch.where(
            is_active.any(), (1 - rate) * before + rate * least, before
        )


class AsynchronousMatryoshkaBatchTopK(AsynchronousBatchTopK, MatryoshkaBatchTopKTrainingSAE):
    """SAELens's nested dictionaries, which do not ask how many features of a level are dead."""

    cfg: MatryoshkaBatchTopKTrainingSAEConfig  # type: ignore[assignment]

    @override
    def calculate_matryoshka_aux_loss(
        self,
        sae_in: Float[Tensor, "tokens d_in"],
        sae_out: Float[Tensor, "tokens d_in"],
        feature_acts: Float[Tensor, "tokens d_sae"],
        hidden_pre: Float[Tensor, "tokens d_sae"],
        dead_neuron_mask: Bool[Tensor, " d_sae"] | None,
    ) -> Float[Tensor, ""]:
        if dead_neuron_mask is None:
            return sae_out.new_zeros(())
        if dead_neuron_mask.device.type == "cpu":
            return super().calculate_matryoshka_aux_loss(
                sae_in, sae_out, feature_acts, hidden_pre, dead_neuron_mask
            )
        decoder, start, losses = self.aux_decoder(), 0, []
        for width, level_out in self._iterable_decode(feature_acts, include_outer_loss=True):
            level = slice(start, width)
            error = (sae_in - level_out).detach()
            losses.append(
                dead_feature_loss(
                    error, hidden_pre[:, level], dead_neuron_mask[level], decoder[level]
                )
            )
            start = width
        return self.cfg.aux_loss_coefficient * torch.stack(losses).sum()


class AsynchronousJumpReLU(JumpReLUTrainingSAE):
    """SAELens's JumpReLU training SAE, which does not ask whether any feature is dead."""

    @override
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Float[Tensor, "tokens d_sae"],
        hidden_pre: Float[Tensor, "tokens d_sae"],
        sae_out: Float[Tensor, "tokens d_in"],
    ) -> dict[str, Tensor]:
        coefficient, dead = self.cfg.pre_act_loss_coefficient, step_input.dead_neuron_mask
        if coefficient is None or dead is None or dead.device.type == "cpu":
            return super().calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out)
        self.cfg.pre_act_loss_coefficient = None  # so that only the other losses are computed
        try:
            losses = super().calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out)
        finally:
            self.cfg.pre_act_loss_coefficient = coefficient
        below = (self.threshold.to(hidden_pre.dtype) - hidden_pre).relu()
        loss = (below * dead * self.W_dec.norm(dim=1)).sum(dim=-1).mean()
        return {**losses, "pre_act_loss": coefficient * loss}


def dead_feature_loss(
    error: Float[Tensor, "tokens d"],
    hidden_pre: Float[Tensor, "tokens n"],
    dead: Bool[Tensor, " n"],
    W_dec: Float[Tensor, "n d"],
) -> Float[Tensor, ""]:
    """SAELens's loss for dead features without its coefficient; 0 if no feature is dead.

    Each token's d/2 dead features with the largest pre-activations reconstruct its error. While
    fewer are dead the loss is scaled by their number over d/2.
    """
    k_aux = error.shape[-1] // 2
    acts = calculate_topk_aux_acts(min(k_aux, len(dead)), hidden_pre, dead)
    acts = acts.masked_fill(~dead, 0.0)  # where fewer are dead, the top-k also holds living ones
    loss = (acts @ W_dec - error).pow(2).sum(dim=-1).mean()
    n_dead = dead.sum(dtype=torch.promote_types(loss.dtype, torch.float32))
    return ((n_dead / k_aux).clamp(max=1.0) * loss).to(loss.dtype)
