"""Folders of tiny saved SAEs: every architecture, as it is saved now and as it was before."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens.registry import SAE_CLASS_REGISTRY
from safetensors.torch import load_file, save_file

from sae_lens_route import saes
from sae_lens_route.saes.metadata import crosscoder_hook_name, routed_hook_name

D, M, BLOCKS = 8, 16, [2, 3, 5]
CFG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"


@dataclass(frozen=True)
class Base:
    """A good folder."""

    name: str
    folder: Path

    @property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / CFG).read_text())

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / WEIGHTS)


def _metadata(hook_name: str) -> dict[str, Any]:
    return {
        "model_name": "demo",
        "model_class_name": "HookedTransformer",
        "model_from_pretrained_kwargs": {},
        "hook_name": hook_name,
        "hook_names": [f"blocks.{block}.hook_resid_post" for block in BLOCKS],
        "routed_blocks": BLOCKS,
        "context_size": 16,
        "prepend_bos": True,
        "exclude_special_tokens": True,
        "seqpos_slice": [None],
        "dataset_path": "demo",
    }


def _bases() -> dict[str, Any]:
    size = {"d_in": D, "d_sae": M, "n_routed_layers": len(BLOCKS)}
    wide = {**size, "d_in": D * len(BLOCKS)}
    shares = {"routing": "uniform", "route_shares": [0.5, 0.25, 0.25], "routing_seed": 3}
    return {
        "topk": saes.RouteTopKSAEConfig(**size, k=4),
        "topk, attention": saes.RouteTopKSAEConfig(
            **size, k=4, aggregation="attention", apply_b_dec_to_input=False
        ),
        "topk, float64": saes.RouteTopKSAEConfig(
            **size, k=4, dtype="float64", rescale_acts_by_decoder_norm=True
        ),
        "topk, shares": saes.RouteTopKSAEConfig(**size, k=4, **shares),
        "jumprelu": saes.RouteJumpReLUSAEConfig(**size, aggregation="mean"),
        "standard, soft": saes.RouteStandardSAEConfig(**size, routing="soft"),
        "gated": saes.RouteGatedSAEConfig(**size),
        "crosscoder": saes.CrosscoderConfig(**wide),
        "crosscoder, topk": saes.TopKCrosscoderConfig(**wide, k=4),
    }


def good_folders(parent: Path) -> list[Base]:
    """Every architecture; each as it is saved now, and as before digests and new names."""
    bases = []
    for name, config in _bases().items():
        torch.manual_seed(0)
        sae = SAE_CLASS_REGISTRY[config.architecture()][0](config)
        with torch.no_grad():
            for parameter in sae.parameters():
                parameter.normal_()
            if hasattr(sae, "threshold"):
                sae.threshold.abs_()
        crosscoder = isinstance(sae, saes.Crosscoder | saes.TopKCrosscoder)
        hook_name = (crosscoder_hook_name if crosscoder else routed_hook_name)(BLOCKS[-1])
        for key, value in _metadata(hook_name).items():
            setattr(sae.cfg.metadata, key, value)
        new = parent / f"{name} new"
        sae.save_model(new)
        save_file({"sparsity": torch.rand(M).log10()}, new / SPARSITY)
        bases += [Base(f"{name}, new", new), Base(f"{name}, old", _as_before(new, f"{name} old"))]
    return bases


def _as_before(folder: Path, name: str) -> Path:
    """The folder as versions before 0.1.0 wrote it."""
    old = folder.with_name(name)
    shutil.copytree(folder, old)
    config = json.loads((old / CFG).read_text())
    metadata = config["metadata"]
    del metadata["weights_sha256"]
    metadata["routed_layers"] = metadata.pop("routed_blocks")
    metadata["hook_name"] = re.sub(r"\.(route|stack)\.hook_resid_post", "", metadata["hook_name"])
    metadata["hook_name"] += ".hook_resid_stack" if "crosscoder" in name else ".hook_resid_route"
    if "route_shares" in config:
        config["layer_shares"] = config.pop("route_shares")
    (old / CFG).write_text(json.dumps(config))
    return old
