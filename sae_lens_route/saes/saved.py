"""A folder with a saved RouteSAE or crosscoder, read with every check.

`SAE.load_from_disk` and `SAE.from_pretrained` check configuration and weights by themselves, in the
methods of `streams.py` that they call. What these cannot see is checked here, where the files are:
JSON and safetensors that cannot be read, dtypes before conversion, `sparsity.safetensors`. And
every message names the folder.

    sae = load_saved_sae("runs/route")
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAE, SAEConfig
from sae_lens.util import str_to_dtype
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sae_lens_route.errors import UserError
from sae_lens_route.saes.crosscoder import CrosscoderSAEMixin
from sae_lens_route.saes.routed import RoutedSAEMixin
from sae_lens_route.saes.saved_config import check_saved_config, read_json_object
from sae_lens_route.saes.saved_weights import check_values, weights_error
from sae_lens_route.saes.streams import StreamsConfigMixin


def load_saved_sae(
    path: str | Path, device: str = "cpu", dtype: str | None = None
) -> RoutedSAEMixin | CrosscoderSAEMixin:
    """The RouteSAE or crosscoder saved in a folder.

    Args:
        path: The folder.
        device: Device of the SAE.
        dtype: Of the weights; None means as they were saved.

    Raises:
        UserError: The folder holds no such SAE, or its files are damaged or disagree; the message
            names the folder, the file, and the field or tensor.
    """
    with _naming(path):
        sae = SAE.load_from_disk(path, device, dtype, converter=_read_checked)
    assert isinstance(sae, RoutedSAEMixin | CrosscoderSAEMixin)
    return sae


def describe_saved_sae(path: str | Path) -> dict[str, Any]:
    """Configuration and shapes of weights of a saved SAE, SAELens's own included.

    Raises:
        UserError: As `load_saved_sae`; of SAELens's own SAEs only a file that cannot be read.
    """
    with _naming(path):
        config, weights = _files(Path(path), "cpu")
        if issubclass(_config_class(config), StreamsConfigMixin):
            load_saved_sae(path)
    return {"cfg": config, "weights": {name: list(each.shape) for name, each in weights.items()}}


def _read_checked(
    path: str | Path, device: str, cfg_overrides: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A SAELens loader that checks what only the files show."""
    config, weights = _files(Path(path), device)
    cls = _config_class(config)
    if not issubclass(cls, StreamsConfigMixin):
        raise UserError(
            f"cfg.json: architecture={cls.architecture()!r}: a {cls.architecture()} SAE, not a "
            "RouteSAE or a crosscoder"
        )
    if "metadata" not in config:
        raise UserError("cfg.json: metadata is missing")
    if "sae_lens_version" in config:
        raise UserError(
            "cfg.json: sae_lens_version: belongs to metadata; with it here SAELens would read the "
            "file as one from before version 6"
        )
    check_saved_config(cls, config)
    for name, tensor in weights.items():
        _require_float(SAE_WEIGHTS_FILENAME, name, tensor)
    for name in check_values(weights, config["metadata"].pop("weights_sha256", None)):
        raise weights_error(name, f"has dtype {weights[name].dtype}, it was saved in another one")
    _check_sparsity(Path(path) / SPARSITY_FILENAME, config["d_sae"])
    config |= {"device": device, **(cfg_overrides or {})}
    dtype = str_to_dtype(config["dtype"])
    return config, {name: tensor.to(dtype) for name, tensor in weights.items()}


def _files(folder: Path, device: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = read_json_object(folder / SAE_CFG_FILENAME)
    return config, _tensors(folder / SAE_WEIGHTS_FILENAME, device)


def _config_class(config: dict[str, Any]) -> type[SAEConfig]:
    if "architecture" not in config:
        raise UserError("cfg.json: architecture is missing")
    name = config["architecture"]
    if isinstance(name, str) and name in SAE_CLASS_REGISTRY:
        return SAE_CLASS_REGISTRY[name][1]
    if isinstance(name, str) and name in SAE_TRAINING_CLASS_REGISTRY:
        raise UserError(
            f"cfg.json: architecture={name!r}: a checkpoint of a training run, which only "
            "TrainingSAE.load_from_disk loads; take the folder that the run ended with"
        )
    known = ", ".join(sorted(SAE_CLASS_REGISTRY))
    raise UserError(f"cfg.json: architecture={name!r}: must be one of {known}")


def _check_sparsity(path: Path, d_sae: int) -> None:
    if not path.exists():
        return
    tensors = _tensors(path, "cpu")
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if shapes != {"sparsity": [d_sae]}:
        raise UserError(f"{path.name}: must hold sparsity with shape [{d_sae}], holds {shapes}")
    _require_float(path.name, "sparsity", tensors["sparsity"])
    if not bool(torch.isfinite(tensors["sparsity"]).all()):
        raise UserError(f"{path.name}: sparsity holds values that are not finite")


def _tensors(path: Path, device: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"no {path.name} there, so no saved SAE")
    try:
        return load_file(path, device=device)
    except (OSError, SafetensorError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path.name}: cannot be read as safetensors: {reason}") from error


def _require_float(file: str, name: str, tensor: Tensor) -> None:
    if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
        raise UserError(f"{file}: {name} has dtype {tensor.dtype}, not a floating-point one")


@contextmanager
def _naming(folder: str | Path) -> Iterator[None]:
    """Name the folder in errors about its files."""
    prefix = f"PATH={str(folder)!r}: "
    try:
        yield
    except UserError as error:
        if str(error).startswith(prefix):
            raise
        raise UserError(f"{prefix}{error}") from error
