"""The reference implementation's numbers (tests/golden/README.md says what is what)."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sae_lens_route.saes import RouteTopKTrainingSAE, RouteTopKTrainingSAEConfig

FOLDER = Path(__file__).parents[1] / "golden"

REFERENCE_NAMES = {
    "router.weight": "W_router",
    "sae.encoder.weight": "W_enc",
    "sae.decoder.weight": "W_dec",
    "sae.pre_bias": "b_dec",
    "sae.latent_bias": "b_enc",
}


def load(name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and JSON of one golden file, such as `seed0_route`."""
    path = FOLDER / "public" / name
    return load_file(path.with_suffix(".safetensors")), json.loads(
        path.with_suffix(".json").read_text()
    )


def to_ours(reference: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Reference parameters under our names; matrices are stored transposed there."""
    return {
        ours: (reference[prefix + theirs].T if ours.startswith("W") else reference[prefix + theirs])
        for theirs, ours in REFERENCE_NAMES.items()
    }


def golden_sae(tensors: dict[str, torch.Tensor], info: dict[str, Any], **options: Any):
    """A training SAE that holds the golden `param.*`, which training leaves as they are."""
    sae = RouteTopKTrainingSAE(
        RouteTopKTrainingSAEConfig(
            d_in=info["d"],
            d_sae=info["latent_size"],
            k=info["k"],
            n_routed_layers=9,
            **{"decoder_norm_interval": 0, "b_dec_init": "zeros", **options},
        )
    )
    sae.load_state_dict(to_ours(tensors, "param."))
    return sae
