"""The language model of a saved SAE: as its file names it, or given by the user, and fitting."""

from __future__ import annotations

from typing import Any, cast

import torch

from sae_lens_route.errors import UserError
from sae_lens_route.models.kinds import LanguageModel
from sae_lens_route.models.load import load_model, load_named_model
from sae_lens_route.saes.crosscoder import CrosscoderSAEMixin
from sae_lens_route.saes.metadata import source_hook_names
from sae_lens_route.saes.routed import RoutedSAEMixin
from sae_lens_route.splice.attach import attach


def load_model_of(
    sae: RoutedSAEMixin | CrosscoderSAEMixin,
    model_name: str | None = None,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> LanguageModel:
    """The language model that a saved SAE was trained on.

    The SAE's metadata may come from a stranger. Of what it says only a name and options that cannot
    run code are taken (`models/trust.py`), unless `trust_remote_code` is set.

    Args:
        sae: A RouteSAE or crosscoder with its metadata.
        model_name: Another name or folder of the model, instead of the file's name and options.
        device: Device of the model.
        trust_remote_code: Take everything that the metadata says, and run the model's code.

    Raises:
        UserError: The model cannot be loaded, or not without trust, or the SAE does not fit it.
    """
    metadata = sae.cfg.metadata
    if model_name is None:
        model = load_named_model(
            metadata.model_name,
            metadata.model_class_name,
            metadata.model_from_pretrained_kwargs,
            device=device,
            trust_remote_code=trust_remote_code,
        )
    else:
        kind = metadata.model_class_name or "HookedTransformer"
        model = load_model(model_name, kind, device=device, trust_remote_code=trust_remote_code)
    require_fitting_model(model, sae)
    return model


def require_fitting_model(model: LanguageModel, sae: RoutedSAEMixin | CrosscoderSAEMixin) -> None:
    """Check that an SAE's blocks, width and hook names are those of a model.

    Raises:
        UserError: They are not; the message names what differs.
    """
    try:
        attach(model, sae).remove()
        unknown = [
            name for name in source_hook_names(sae) if name not in cast("Any", model).hook_dict
        ]
        if unknown:
            raise UserError(f"metadata.hook_names={unknown}: the model has no such hooks")
    except UserError as error:
        name = sae.cfg.metadata.model_name
        raise UserError(
            f"{error}; the SAE was trained on model_name={name!r}, give that model"
        ) from error
