"""Folders of saved SAEs with one thing wrong: changed copies of those in `saved_folders.py`."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens.registry import SAE_CLASS_REGISTRY
from safetensors.torch import save_file

from support.saved_folders import CFG, SPARSITY, WEIGHTS, Base, M

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 5, 7, 10**6, 2**31, 2**63, -(2**63), 10**30),
    *(0.0, 0.5, 8.0, -2.5, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", "x", "none", "hard", "soft", "uniform", "float32", "bfloat16", "int8", "cuda:9", "\0"),
    *("../../etc/passwd", "é" * 5, "a" * 10_000, "8", "1e3", "__class__", "{{7*7}}"),
    *([], [1], [None], ["x"], [[2], [3]], [0.5, 0.5], [2, 3, 5, 6], {}, {"a": 1}, {"k": {"k": {}}}),
]


@dataclass(frozen=True)
class Mutant:
    """A folder with one thing wrong."""

    base: Base
    kind: str
    folder: Path


def _places(config: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Every key, at the top and in the metadata."""
    metadata = config["metadata"]
    return [*((config, key) for key in config), *((metadata, key) for key in metadata)]


def _place(config: dict[str, Any], rng: random.Random) -> tuple[dict[str, Any], str]:
    return rng.choice(_places(config))


def _remove(config: dict[str, Any], rng: random.Random) -> None:
    holder, key = _place(config, rng)
    del holder[key]


def _rename(config: dict[str, Any], rng: random.Random) -> None:
    holder, key = _place(config, rng)
    holder[rng.choice([f"{key}_", key.upper(), f" {key}", key[:-1]])] = holder.pop(key)


def _replace(config: dict[str, Any], rng: random.Random) -> None:
    holder, key = _place(config, rng)
    holder[key] = rng.choice(VALUES)


def _retype(config: dict[str, Any], rng: random.Random) -> None:
    holder, key = _place(config, rng)
    value = holder[key]
    holder[key] = rng.choice([str(value), [value], {"value": value}, not value, None])


def _shift(config: dict[str, Any], rng: random.Random) -> None:
    holder, key = rng.choice([p for p in _places(config) if type(p[0][p[1]]) in (int, float)])
    value = holder[key]
    holder[key] = rng.choice([value + 1, value - 1, 2 * value, -value, value / 2, value * 10**12])


def _change_list(config: dict[str, Any], rng: random.Random) -> None:
    lists = [p for p in _places(config) if isinstance(p[0][p[1]], list) and len(p[0][p[1]]) > 0]
    holder, key = rng.choice(lists)
    old = holder[key]
    new = rng.choice(
        [old[:-1], old[1:], [*old, old[-1]], old[::-1], [*old[1:], old[0]], [old[0]] * len(old)]
    )
    holder[key] = new


def _architecture(config: dict[str, Any], rng: random.Random) -> None:
    config["architecture"] = rng.choice([*SAE_CLASS_REGISTRY, "route_batchtopk", "ROUTE_TOPK", ""])


def _swap_fields(config: dict[str, Any], rng: random.Random) -> None:
    (a, i), (b, j) = _place(config, rng), _place(config, rng)
    a[i], b[j] = b[j], a[i]


def _add_field(config: dict[str, Any], rng: random.Random) -> None:
    holder = rng.choice([config, config["metadata"]])
    names = ["k", "sae_lens_version", "routed_layers", "layer_shares", "weights_sha256", "junk"]
    names += ["model_from_pretrained_kwargs", "finetuning_scaling_factor", "activation_fn_str"]
    holder[rng.choice(names)] = rng.choice(VALUES)


def _metadata_digest(config: dict[str, Any], rng: random.Random) -> None:
    digests = config["metadata"].setdefault("weights_sha256", {"W_enc": "float32:" + "0" * 64})
    key = rng.choice(sorted(digests))
    old = digests.pop(key)
    new = rng.choice([None, "", old[:-1], old.upper(), "int8" + old[7:], "0" * len(old), 5, old])
    if new is not None:
        digests[rng.choice([key, "W_dec", "other"])] = new


CONFIG_CHANGES: list[Callable[[dict[str, Any], random.Random], None]] = [
    *(_remove, _remove, _rename, _replace, _replace, _replace, _retype, _shift, _change_list),
    *(_architecture, _swap_fields, _add_field, _metadata_digest),
]


def _config_bytes(content: bytes, rng: random.Random) -> bytes:
    """Damaged JSON."""
    flipped = bytearray(content)
    flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    text = content.decode()
    return rng.choice(
        [
            bytes(flipped),
            bytes(flipped),
            bytes(flipped),
            content[: rng.randrange(len(content))],
            content + content,
            content + b"\0",
            b"",
            b"[]",
            b"null",
            b"3",
            b'"cfg"',
            b"[" * 100_000,
            b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
            b'{"d_in": ' + b"9" * 10_000 + b"}",
            b"\xef\xbb\xbf" + content,
            text.encode("utf-16"),
            rng.randbytes(200),
            text.replace('"d_in": 8', '"d_in": 8, "d_in": 9').encode(),
            text.replace('"metadata": {', '"metadata": {}, "metadata": {').encode(),
            text.replace(" 8,", " NaN,").encode(),
        ]
    )


def _change_tensor(weights: dict[str, torch.Tensor], rng: random.Random) -> None:
    name = rng.choice(sorted(weights))
    tensor = weights[name].clone()
    other = rng.choice(sorted(weights))
    index = rng.randrange(tensor.numel())

    def with_value(value: float) -> torch.Tensor:
        tensor.view(-1)[index] = value
        return tensor

    change = rng.randrange(18)
    if change == 0:
        del weights[name]
    elif change == 1:
        weights[rng.choice([f"{name}_", name.lower(), "W_skip", "scaling_factor"])] = weights.pop(
            name
        )
    elif change == 2:
        weights[rng.choice(["scaling_factor", "extra", "module.W_enc"])] = torch.ones(3)
    elif change == 3:
        weights[name], weights[other] = weights[other].clone(), tensor
    else:
        weights[name] = [
            lambda: with_value(float("nan")),
            lambda: with_value(float("inf")),
            lambda: with_value(-float("inf")),
            lambda: with_value(3e4),
            lambda: tensor.t().contiguous() if tensor.ndim == 2 else tensor[:-1].clone(),
            lambda: tensor.reshape(-1),
            lambda: tensor[:-1].clone(),
            lambda: torch.cat([tensor, tensor]),
            lambda: tensor.unsqueeze(0),
            lambda: tensor.sum(),
            lambda: torch.empty(0, *tensor.shape[1:], dtype=tensor.dtype),
            lambda: tensor.to(
                rng.choice([torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
            ),
            lambda: tensor.to(rng.choice([torch.int8, torch.int32, torch.int64, torch.bool])),
            lambda: torch.randn(tensor.shape, dtype=tensor.dtype),
        ][change - 4]()


def _weight_bytes(content: bytes, rng: random.Random) -> bytes:
    """A damaged safetensors file."""
    (n,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + n], content[8 + n :]

    def with_header(new: bytes) -> bytes:
        return struct.pack("<Q", len(new)) + new + data

    def flip(start: int, end: int) -> bytes:
        flipped = bytearray(content)
        flipped[rng.randrange(start, end)] ^= 1 << rng.randrange(8)
        return bytes(flipped)

    entries = json.loads(header)
    name = rng.choice([key for key in entries if key != "__metadata__"])
    entry = entries[name]
    start, end = entry["data_offsets"]
    change = rng.randrange(22)
    if change < 8:
        return flip(8 + n, len(content))
    if change < 11:
        return flip(8, 8 + n)
    if change < 12:
        return flip(0, 8)
    if change < 14:
        entry["data_offsets"] = rng.choice(
            [[end, start], [start, end + 8], [start + 4, end], [-1, end], [0, 2**63], [0], "x"]
        )
        return with_header(json.dumps(entries).encode())
    if change < 15:
        entry["shape"] = rng.choice([[2**62, 4], [-1], [], [0], "x", [10**30], [1.5]])
        return with_header(json.dumps(entries).encode())
    if change < 16:
        entry["dtype"] = rng.choice(["F64", "I32", "BOOL", "BF16", "X", "", 5, "U32"])
        return with_header(json.dumps(entries).encode())
    return rng.choice(
        [
            lambda: content[: rng.randrange(len(content))],
            lambda: content + rng.randbytes(rng.randrange(1, 64)),
            lambda: b"",
            lambda: rng.randbytes(len(content)),
            lambda: struct.pack("<Q", rng.choice([0, 1, 2**32, 2**62, 2**64 - 1])) + content[8:],
            lambda: with_header(b"{}"),
            lambda: with_header(b"[" * 10_000),
            lambda: with_header(header + b" " * (1 << 20)),
            lambda: with_header(header.replace(b"W_enc", b"W_dec")),
            lambda: b"\x80\x04K\x01." + content,
        ]
    )()


def _change_sparsity(path: Path, rng: random.Random) -> None:
    good = torch.rand(M).log10()
    change = rng.randrange(7)
    if change == 0:
        path.unlink()
    elif change == 1:
        path.write_bytes(rng.choice([b"", b"junk", path.read_bytes()[:-5]]))
    else:
        tensors = [
            {"sparsity": good[:-1].clone()},
            {"sparsity": torch.full((M,), float("nan"))},
            {"other": good},
            {"sparsity": good, "more": good.clone()},
            {"sparsity": torch.ones(M, dtype=torch.int64)},
        ][change - 2]
        save_file(tensors, path)


def _change_files(folder: Path, rng: random.Random, bases: list[Base]) -> None:
    name = rng.choice([CFG, WEIGHTS])
    path, other = folder / name, rng.choice(bases).folder / name
    change = rng.randrange(6)
    path.unlink()
    if change == 1:
        path.mkdir()
    elif change == 2:
        path.symlink_to(folder / "nowhere")
    elif change == 3:
        os.mkfifo(path)
    elif change == 4:
        path.symlink_to(path)
    elif change == 5:
        shutil.copy(other, path)


KINDS = (
    *(["config"] * 12),
    *(["JSON"] * 4),
    *(["tensor"] * 7),
    *(["safetensors"] * 7),
    "sparsity",
    "files",
)
"""How often each kind of change is drawn."""


def mutants(bases: list[Base], n: int, parent: Path, seed: int = 0) -> Iterator[Mutant]:
    """`n` mutants one after another, each deleted when the next is made."""
    rng = random.Random(seed)
    folder = parent / "mutant"
    for i in range(n):
        base = bases[i % len(bases)]
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(base.folder, folder)
        kind = rng.choice(KINDS)
        if kind == "config":
            config = base.config
            change = rng.choice(CONFIG_CHANGES)
            change(config, rng)
            kind = f"config: {change.__name__.strip('_').replace('_', ' ')}"
            (folder / CFG).write_text(json.dumps(config))
        elif kind == "JSON":
            (folder / CFG).write_bytes(_config_bytes((folder / CFG).read_bytes(), rng))
        elif kind == "tensor":
            weights = base.weights
            _change_tensor(weights, rng)
            save_file(weights, folder / WEIGHTS)
        elif kind == "safetensors":
            (folder / WEIGHTS).write_bytes(_weight_bytes((folder / WEIGHTS).read_bytes(), rng))
        elif kind == "sparsity":
            _change_sparsity(folder / SPARSITY, rng)
        else:
            _change_files(folder, rng, bases)
        yield Mutant(base, kind, folder)
