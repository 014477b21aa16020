"""What kind of SAE one holds, for code that takes several kinds."""

from __future__ import annotations

from typing import Any, TypeGuard

from sae_lens.saes.sae import SAE

from sae_lens_route.saes.crosscoder import CrosscoderSAEMixin

SPARSITY_FIELDS = ("k", "l1_coefficient", "l0_coefficient", "target_l0")
"""Configuration fields that set how many features are active; each architecture has one or two."""


def is_crosscoder(sae: object) -> TypeGuard[CrosscoderSAEMixin]:
    """Whether the SAE reads and writes all routed blocks at once."""
    return isinstance(sae, CrosscoderSAEMixin)


def is_soft(sae: SAE[Any]) -> bool:
    """Whether the SAE reads a mixture of blocks (Eq. 14), so that edits have no block to go to."""
    return getattr(sae.cfg, "routing", None) == "soft"
