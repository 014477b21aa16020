"""Loading the checkpoints of the paper's published code as RouteSAEs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sae_lens import __version__ as sae_lens_version
from torch import Tensor

from sae_lens_route.runner import routed_hook_name

_OURS = {
    "router.weight": "W_router",
    "sae.encoder.weight": "W_enc",
    "sae.decoder.weight": "W_dec",
    "sae.pre_bias": "b_dec",
    "sae.latent_bias": "b_enc",
}


def reference_converter(
    k: int,
    *,
    routed_layers: list[int] | None = None,
    aggregation: str = "sum",
    routing: str = "hard",
    model_name: str = "meta-llama/Llama-3.2-1B-Instruct",
    context_size: int = 512,
) -> Callable[..., tuple[dict[str, Any], dict[str, Tensor]]]:
    """A `converter=` for `SAE.load_from_disk` that reads the published code's `.pt` files.

    The file holds weights only (and is read without executing pickles), so what else it was
    trained with is given here.

        SAE.load_from_disk("RouteSAE.pt", converter=reference_converter(k=64))

    Args:
        k: Active features per token.
        routed_layers: The routed blocks. None means 3 ... 11, as in the paper.
        aggregation: "sum" or "mean".
        routing: "hard" or "soft".
        model_name: The language model it was trained on.
        context_size: Tokens in a context.

    Raises:
        ValueError: (when loading) the file is not such a checkpoint.
    """
    layers = list(range(3, 12)) if routed_layers is None else list(routed_layers)

    def convert(
        path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        theirs = torch.load(path, map_location=device, weights_only=True)
        if missing := [name for name in _OURS if name not in theirs]:
            raise ValueError(
                f"{path}: not a RouteSAE checkpoint of the published code: no {missing}"
            )
        weights = {
            ours: theirs[name].T.contiguous() if ours.startswith("W") else theirs[name]
            for name, ours in _OURS.items()
        }
        d_in, n_layers = weights["W_router"].shape
        if n_layers != len(layers):
            raise ValueError(
                f"routed_layers={layers}: the router in {path} chooses between {n_layers} layers"
            )
        config = {
            "architecture": "route_topk",
            "d_in": d_in,
            "d_sae": weights["W_enc"].shape[1],
            "k": k,
            "n_routed_layers": n_layers,
            "routing": routing,
            "aggregation": aggregation,
            "dtype": "float32",
            "device": device,
            "metadata": {
                "sae_lens_version": sae_lens_version,
                "model_name": model_name,
                "model_class_name": "HookedTransformer",
                "hook_name": routed_hook_name(layers[-1]),
                "hook_names": [f"blocks.{layer}.hook_resid_post" for layer in layers],
                "routed_layers": layers,
                "context_size": context_size,
                "prepend_bos": True,
                "exclude_special_tokens": False,
            },
            **(cfg_overrides or {}),
        }
        return config, weights

    return convert
