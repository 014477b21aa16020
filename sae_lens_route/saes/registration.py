"""Making SAELens know an architecture, so that it is built by name from `cfg.json`."""

from __future__ import annotations

from sae_lens.registry import (
    SAE_CLASS_REGISTRY,
    SAE_TRAINING_CLASS_REGISTRY,
    register_sae_class,
    register_sae_training_class,
)
from sae_lens.saes.sae import SAE, SAEConfig, TrainingSAE, TrainingSAEConfig


def register(
    training_sae: type[TrainingSAE],
    training_config: type[TrainingSAEConfig],
    sae: type[SAE] | None = None,
    config: type[SAEConfig] | None = None,
) -> None:
    """Register an architecture with SAELens; calling it again, as an autoreload does, is harmless.

    Without `sae` and `config`, the architecture is saved as another one.
    """
    architecture = training_config.architecture()
    SAE_TRAINING_CLASS_REGISTRY.pop(architecture, None)
    if sae is not None and config is not None:
        # first, because the training configuration looks its inference class up
        SAE_CLASS_REGISTRY.pop(architecture, None)
        register_sae_class(architecture, sae, config)
    register_sae_training_class(architecture, training_sae, training_config)
