"""What `sae_weights.safetensors` must hold: finite tensors of the SAE's names and shapes, whose
function is finite, and those that were saved.

At saving, the SHA-256 of every tensor is written to `metadata.weights_sha256` of `cfg.json`, as
`{"W_dec": "float32:9f86…"}`: of its dtype, shape and bytes. SAELens's loaders convert tensors to
the dtype of the configuration. A wider one is converted back for the comparison; a narrower one
cannot be compared, which is a warning.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sae_lens.constants import DTYPE_MAP, DTYPE_TO_STR, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from safetensors.torch import save_file
from torch import Tensor

from sae_lens_route.errors import UserError

_DIGEST = re.compile(r"(\w+):[0-9a-f]{64}")


def write_saved_sae(
    folder: str | Path, weights: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[Path, Path]:
    """Write SAELens's two files, with `metadata.weights_sha256`; returns their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights_path, config_path = folder / SAE_WEIGHTS_FILENAME, folder / SAE_CFG_FILENAME
    metadata = {**config["metadata"], "weights_sha256": weight_digests(weights)}
    save_file(dict(weights), weights_path)
    config_path.write_text(json.dumps({**config, "metadata": metadata}), encoding="utf-8")
    return weights_path, config_path


def weight_digests(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """`dtype:SHA-256` of every tensor, by name."""
    return {name: _digest(weights[name]) for name in sorted(weights)}


def check_values(weights: Mapping[str, Tensor], digests: Mapping[str, str] | None) -> list[str]:
    """Check that tensors are finite and, if their digests are known, those that were saved.

    Returns:
        The tensors that have a digest but a narrower dtype than was saved, so that nothing is known
        about them.

    Raises:
        UserError: A tensor is not; the message names it.
    """
    for name, tensor in weights.items():
        _require_finite(name, tensor, "holds values")
        if name == "log_threshold":  # of checkpoints by older versions of SAELens
            _require_finite(name, tensor.exp(), "gives thresholds")
    if digests is None:
        return []
    if weights.keys() != digests.keys():
        raise UserError(
            f"cfg.json: metadata.weights_sha256 names {sorted(digests)}, "
            f"sae_weights.safetensors holds {sorted(weights)}"
        )
    return [name for name, tensor in weights.items() if not _is_saved(name, tensor, digests)]


def warn_of_narrow(names: list[str]) -> None:
    """Say that nothing is known about these tensors."""
    if names:
        warnings.warn(
            f"sae_weights.safetensors: {', '.join(names)} in a narrower dtype than was saved, so "
            "metadata.weights_sha256 cannot be checked; load in the saved dtype, then convert",
            stacklevel=2,
        )


def check_shapes(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Check names and shapes against the SAE that the configuration describes.

    Raises:
        UserError: They differ; the message names the tensor.
    """
    for name in sorted(expected.keys() - weights.keys()):
        raise weights_error(name, "is missing; the configuration has it")
    for name in sorted(weights.keys() - expected.keys()):
        raise weights_error(name, "is no weight of the SAE that the configuration describes")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise weights_error(
                name,
                f"has shape {list(tensor.shape)}, not {list(expected[name].shape)} as cfg.json",
            )


def check_function(weights: Mapping[str, Tensor], rescale_acts_by_decoder_norm: bool) -> None:
    """Check that what an SAE computes from its weights alone, for any input, is finite.

    Args:
        weights: With the shapes of the SAE.
        rescale_acts_by_decoder_norm: Whether it multiplies and divides by the decoder's norms.

    Raises:
        UserError: It is not; the message names the tensor.
    """
    if "r_mag" in weights:
        magnitudes = weights["W_enc"] * weights["r_mag"].exp()
        _require_finite("r_mag", magnitudes, "gives encoder weights W_enc * exp(r_mag)")
    if rescale_acts_by_decoder_norm:
        norms = weights["W_dec"].norm(dim=-1)
        _require_finite(
            "W_dec", torch.stack([norms, 1 / norms]), "has rows of norms, or inverses of norms,"
        )


def _require_finite(name: str, values: Tensor, what: str) -> None:
    if not values.is_meta and not bool(torch.isfinite(values).all()):
        raise weights_error(name, f"{what} that are not finite")


def _is_saved(name: str, tensor: Tensor, digests: Mapping[str, str]) -> bool:
    """False if the tensor cannot be compared with its digest; raises if it differs."""
    match = _DIGEST.fullmatch(digests[name])
    dtype = None if match is None else DTYPE_MAP.get(match[1])
    if dtype is None:
        raise UserError(
            f"cfg.json: metadata.weights_sha256.{name}={digests[name]!r}: not dtype:SHA-256"
        )
    if tensor.is_meta or torch.promote_types(tensor.dtype, dtype) != tensor.dtype:
        return False
    if _digest(tensor.to(dtype)) != digests[name]:
        raise weights_error(
            name,
            "is not the tensor that was saved (its SHA-256 differs from metadata.weights_sha256); "
            "copy the folder again, or remove weights_sha256 from cfg.json to use it all the same",
        )
    return True


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous()
    dtype = DTYPE_TO_STR[data.dtype]
    digest = hashlib.sha256(f"{dtype} {list(data.shape)}\n".encode())
    digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return f"{dtype}:{digest.hexdigest()}"


def weights_error(name: str, problem: str) -> UserError:
    """An error about one tensor of the weights."""
    return UserError(f"sae_weights.safetensors: {name} {problem}")
