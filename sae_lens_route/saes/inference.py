"""From an SAE in training to an SAE for inference, without a detour through files."""

from __future__ import annotations

from typing import Any

import torch
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.sae import SAE, TrainingSAE
from torch import Tensor

from sae_lens_route.errors import UserError
from sae_lens_route.saes.routed import RoutedTrainingSAEMixin, unit_rows


def to_inference(training_sae: TrainingSAE[Any]) -> SAE[Any]:
    """The SAE that saving `training_sae` and loading it again returns."""
    config = training_sae.cfg.get_inference_sae_cfg_dict()
    weights = _inference_weights(training_sae)
    if (
        isinstance(training_sae, RoutedTrainingSAEMixin)
        and training_sae.cfg.decoder_norm_interval > 0
    ):
        weights["W_dec"] = unit_rows(weights["W_dec"])
    return _built(config, weights)


def as_routed(training_sae: TrainingSAE[Any]) -> SAE[Any]:
    """A SAELens SAE trained on n(x) of one block, as the RouteSAE with that one routed block.

    With a single block p is 1 and x_route is n(x), so the normalization becomes part of the SAE,
    and code that takes a RouteSAE takes the result.

    Raises:
        UserError: SAELens's architecture has no routed counterpart.
    """
    config = training_sae.cfg.get_inference_sae_cfg_dict()
    architecture = f"route_{config['architecture']}"
    if architecture not in SAE_CLASS_REGISTRY:
        raise UserError(f"{config['architecture']!r} has no routed counterpart {architecture!r}")
    weights = _inference_weights(training_sae)
    W_router = torch.zeros(training_sae.cfg.d_in, 1, dtype=training_sae.dtype)
    weights["W_router"] = W_router.to(training_sae.device)
    routing = {
        "n_routed_layers": 1,
        "routing": "hard",
        "aggregation": "sum",
        "routing_seed": 0,
        "route_shares": None,
    }
    return _built({**config, "architecture": architecture, **routing}, weights)


def _inference_weights(training_sae: TrainingSAE[Any]) -> dict[str, Tensor]:
    weights = {name: value.detach().clone() for name, value in training_sae.state_dict().items()}
    training_sae.process_state_dict_for_saving_inference(weights)
    return weights


def _built(config: dict[str, Any], weights: dict[str, Tensor]) -> SAE[Any]:
    sae = SAE.from_dict(config)
    sae.process_state_dict_for_loading(weights)
    sae.load_state_dict(weights)
    return sae.to(config["device"])
