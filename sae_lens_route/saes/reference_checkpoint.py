"""Loading the checkpoints of the paper's published code as RouteSAEs."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sae_lens import __version__ as sae_lens_version
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor

from sae_lens_route.errors import UserError, reading_errors
from sae_lens_route.saes.architectures import RouteTopKSAEConfig
from sae_lens_route.saes.metadata import routed_hook_name
from sae_lens_route.saes.router import Aggregation, RoutingMode

_NAMES = {
    "router.weight": "W_router",
    "sae.encoder.weight": "W_enc",
    "sae.decoder.weight": "W_dec",
    "sae.pre_bias": "b_dec",
    "sae.latent_bias": "b_enc",
}


def reference_converter(
    k: int,
    *,
    routed_blocks: list[int] | None = None,
    aggregation: Aggregation = "sum",
    routing: RoutingMode = "hard",
    model_name: str = "meta-llama/Llama-3.2-1B-Instruct",
    context_size: int = 512,
) -> Callable[..., tuple[dict[str, Any], dict[str, Tensor]]]:
    """A `converter=` for `SAE.load_from_disk` that reads the published code's `.pt` files.

    The file holds weights only (and is read without executing pickles), so the other settings are
    given here.

        SAE.load_from_disk("RouteSAE.pt", converter=reference_converter(k=64))

    Args:
        k: Active features per token.
        routed_blocks: The routed blocks. None means 3 ... 11, as in the paper.
        aggregation: "sum" or "mean".
        routing: "hard" or "soft".
        model_name: Language model of the training run.
        context_size: Tokens in a context.

    Raises:
        UserError: when loading, if the file is not such a checkpoint.
    """
    blocks = list(range(3, 12)) if routed_blocks is None else list(routed_blocks)

    def convert(
        path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        with reading_errors(str(path), pickle.UnpicklingError, EOFError, RuntimeError):
            theirs = torch.load(path, map_location=device, weights_only=True)
        if missing := [name for name in _NAMES if name not in theirs]:
            raise UserError(
                f"{path}: not a RouteSAE checkpoint of the published code: no {missing}"
            )
        weights = {
            ours: theirs[name].T.contiguous() if ours.startswith("W") else theirs[name]
            for name, ours in _NAMES.items()
        }
        d_in, n_routes = weights["W_router"].shape
        if n_routes != len(blocks):
            raise UserError(
                f"routed_blocks={blocks}: the router in {path} chooses between {n_routes} blocks"
            )
        config = RouteTopKSAEConfig(
            d_in=d_in,
            d_sae=weights["W_enc"].shape[1],
            k=k,
            n_routed_layers=n_routes,
            routing=routing,
            aggregation=aggregation,
            device=device,
            metadata=SAEMetadata(
                sae_lens_version=sae_lens_version,
                model_name=model_name,
                model_class_name="HookedTransformer",
                hook_name=routed_hook_name(blocks[-1]),
                hook_names=[f"blocks.{block}.hook_resid_post" for block in blocks],
                routed_blocks=blocks,
                context_size=context_size,
                prepend_bos=True,
                exclude_special_tokens=False,
            ),
        )
        return {**config.to_dict(), **(cfg_overrides or {})}, weights

    return convert
