"""Training steps that never wait for the device: what SAELens's classes read back, done without.

Each override is bit-identical to the method it replaces. A step that is not logged then reads
nothing from the device and copies nothing to it, unless it has a loss for dead features
(`aux_loss_coefficient`, `pre_act_loss_coefficient`; both off by default): SAELens asks for their
number, which is the size of a top-k.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE
from torch import Tensor
from typing_extensions import override


class AsynchronousTopK(TopKTrainingSAE):
    """SAELens's TopK training SAE without the copy of a 0 to the device in every step."""

    @override
    def calculate_topk_aux_loss(
        self,
        sae_in: Tensor,
        sae_out: Tensor,
        hidden_pre: Tensor,
        dead_neuron_mask: Bool[Tensor, " d_sae"] | None,
    ) -> Float[Tensor, ""]:
        if dead_neuron_mask is None:
            return sae_out.new_zeros(())
        return super().calculate_topk_aux_loss(sae_in, sae_out, hidden_pre, dead_neuron_mask)


class AsynchronousBatchTopK(AsynchronousTopK, BatchTopKTrainingSAE):
    """SAELens's BatchTopK training SAE, which does not ask whether any feature is active."""

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
