"""What `cfg.json` must hold: every field of its configuration class that the SAE's function depends
on, of the class's own types, and metadata that agrees with it.

The rules are those of the dataclasses, so there is no second schema. Fields that a class does not
have are ignored, as SAELens ignores them, except a `k` where there is no TopK: that is a folder
whose architecture was changed. `device` is ignored, because every loader replaces it.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from packaging.version import InvalidVersion, Version
from sae_lens.constants import DTYPE_MAP
from sae_lens.saes.sae import SAEConfig

from sae_lens_route.errors import UserError
from sae_lens_route.saes.metadata import blocks_of_hooks

REQUIRED = (
    *("d_in", "d_sae", "k", "dtype", "n_routed_layers", "routing", "aggregation", "routing_seed"),
    *("apply_b_dec_to_input", "normalize_activations", "reshape_activations"),
    "rescale_acts_by_decoder_norm",
)
"""Fields whose defaults would silently change what a saved SAE computes; a class has some."""

_LARGEST = 2**28  # no dictionary is as large; the product of two still fits a tensor's size
_LARGEST_FILE = 2**24

_METADATA: dict[str, Any] = {
    "sae_lens_version": str,
    "model_name": str | None,
    "model_class_name": str | None,
    "model_from_pretrained_kwargs": dict[str, Any] | None,
    "hook_name": str | None,
    "hook_names": list[str] | None,
    "routed_blocks": list[int] | None,
    "routed_layers": list[int] | None,  # the name before 0.1.0
    "context_size": int | None,
    "prepend_bos": bool | None,
    "exclude_special_tokens": bool | list[int] | None,
    "seqpos_slice": list[int | None] | None,
    "dataset_path": str | None,
    "disable_concat_sequences": bool | None,
    "sequence_separator_token": int | str | None,
    "weights_sha256": dict[str, str] | None,
}
"""Types of the metadata that this package reads; other entries may hold anything."""

_HOOK = re.compile(
    r"blocks\.(\d+)\.(?:(?:(?:route|stack)\.)?hook_resid_post|hook_resid_(?:route|stack))"
)


def check_saved_config(cls: type[SAEConfig], config: Mapping[str, Any]) -> None:
    """Check the content of a `cfg.json` against the class it is to become.

    Raises:
        UserError: A field is missing, has a value of another type, or contradicts another field.
    """
    kinds = _field_types(cls)
    for name in REQUIRED:
        if name in kinds and name not in config:
            raise _error(name, "is missing; the SAE would be another one by default")
    if "route_shares" in kinds and not {"route_shares", "layer_shares"} & config.keys():
        raise _error("route_shares", "is missing; the SAE would be another one by default")
    if config.get("layer_shares") is not None and config.get("route_shares") is not None:
        raise _error("layer_shares", "is the old name of route_shares, which is there too")
    if "k" in config and "k" not in kinds:
        raise _error(f"k={config['k']!r}", f"the architecture {cls.architecture()!r} has no k")
    for name, kind in kinds.items():
        if name in config:
            _require_type(name, config[name], kind)
    if config["dtype"] not in DTYPE_MAP:
        raise _error(f"dtype={config['dtype']!r}", f"must be one of {', '.join(DTYPE_MAP)}")
    for name in ("d_in", "d_sae", "n_routed_layers"):
        if not 1 <= config[name] <= _LARGEST:
            raise _error(f"{name}={config[name]}", f"must be between 1 and {_LARGEST}")
    try:
        cls(**{name: config[name] for name in kinds if name in config})
    except ValueError as error:  # what one field says about another
        raise UserError(f"cfg.json: {error}") from error
    if "metadata" in config:
        _check_metadata(config["metadata"], config["n_routed_layers"])


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: The file is missing, holds no JSON object, or has a key twice.
    """
    if not path.is_file():
        raise UserError(f"no {path.name} there, so no saved SAE")
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise ValueError(f"larger than {_LARGEST_FILE} bytes")
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique_keys)
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path.name}: cannot be read as JSON: {reason}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path.name}: holds a {type(content).__name__}, not an object")
    return content


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"duplicate key {duplicate!r}")
    return content


def _check_metadata(metadata: Any, n_routes: int) -> None:
    _require_type("metadata", metadata, dict[str, Any])
    for name, kind in _METADATA.items():
        if name in metadata:
            _require_type(f"metadata.{name}", metadata[name], kind)
    _check_version(metadata)
    if (metadata.get("context_size") or 1) < 1:
        raise _error(f"metadata.context_size={metadata['context_size']}", "must be at least 1")
    if len(metadata.get("seqpos_slice") or ()) > 3:
        raise _error(
            f"metadata.seqpos_slice={metadata['seqpos_slice']}", "must be start, end, step"
        )
    blocks = _blocks(metadata, n_routes)
    name = metadata.get("hook_name")
    if blocks is None or name is None:
        return
    match = _HOOK.fullmatch(name)
    if match is None or int(match[1]) != blocks[-1]:
        raise _error(
            f"metadata.hook_name={name!r}",
            f"must be the hook of the last routed block, blocks.{blocks[-1]}.route.hook_resid_post",
        )


def _check_version(metadata: Mapping[str, Any]) -> None:
    """SAELens drops most of the metadata of a file that was written by a version before 6."""
    version = metadata.get("sae_lens_version")
    try:
        if version is not None and Version(version) >= Version("6"):
            return
    except InvalidVersion:
        pass
    raise _error(
        f"metadata.sae_lens_version={version!r}", "must be the version that saved the SAE, from 6"
    )


def _blocks(metadata: Mapping[str, Any], n_routes: int) -> list[int] | None:
    """The routed blocks, if all entries that name them agree; None if there is no such entry."""
    named: dict[str, list[int]] = {}
    for name in ("routed_blocks", "routed_layers", "hook_names"):
        value = metadata.get(name)
        if value is None:
            continue
        if len(value) != n_routes:
            raise _error(
                f"metadata.{name}={value}", f"names {len(value)} blocks, n_routed_layers={n_routes}"
            )
        try:
            named[name] = blocks_of_hooks(value) if name == "hook_names" else value
        except UserError as error:
            raise _error(f"metadata.hook_names={value}", "not residual streams") from error
    if not named:
        return None
    (first, blocks), *others = named.items()
    if blocks != sorted(set(blocks)) or blocks[0] < 0:
        raise _error(f"metadata.{first}={metadata[first]}", "the blocks must ascend")
    for name, other in others:
        if other != blocks:
            raise _error(
                f"metadata.{name}={metadata[name]}", f"disagrees with {first}={metadata[first]}"
            )
    return blocks


def _error(what: str, problem: str) -> UserError:
    return UserError(f"cfg.json: {what}: {problem}")


def _require_type(name: str, value: Any, kind: Any) -> None:
    if not _is_a(value, kind):
        shown = repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:80]}…"
        raise _error(f"{name}={shown}", f"must be {_type_name(kind)}")


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a value that was read from JSON is of an annotation's type."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin in (Union, UnionType):
        return any(_is_a(value, each) for each in args)
    if origin is Literal:
        return any(value == each and type(value) is type(each) for each in args)
    if origin in (list, tuple):
        return isinstance(value, list | tuple) and all(_is_a(each, args[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is_a(each, args[1]) for each in value.values())
    if kind is float:
        return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)
    if kind is int:
        return type(value) is int and abs(value) < 2**63
    return isinstance(value, kind)


def _type_name(kind: Any) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(_type_name(each) for each in args)
    if origin is Literal:
        return f"one of {', '.join(map(repr, args))}"
    if origin in (list, tuple):
        return f"a list of {_type_name(args[0])}"
    if origin is dict:
        return "an object"
    return "null" if kind is NoneType else kind.__name__


@cache
def _field_types(cls: type[SAEConfig]) -> dict[str, Any]:
    kinds: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        kinds |= inspect.get_annotations(base, eval_str=True)
    ignored = {"metadata", "device"}
    return {each.name: kinds[each.name] for each in fields(cls) if each.name not in ignored}
