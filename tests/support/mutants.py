"""Folders of saved SAEs with one thing wrong, and an independent judgment of what was loaded.

`Base` is a good folder of tiny size, `mutants` yields changed copies of it. `accepted` says whether
an SAE that was loaded from a mutant is what the files say: its function is computed again here, in
float64 and from the files alone.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens.registry import SAE_CLASS_REGISTRY
from safetensors.torch import load_file, save_file

from sae_lens_route import saes
from sae_lens_route.errors import UserError
from sae_lens_route.saes.metadata import crosscoder_hook_name, routed_hook_name

D, M, BLOCKS = 8, 16, [2, 3, 5]
CFG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 5, 7, 10**6, 2**31, 2**63, -(2**63), 10**30),
    *(0.0, 0.5, 8.0, -2.5, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", "x", "none", "hard", "soft", "uniform", "float32", "bfloat16", "int8", "cuda:9", "\0"),
    *("../../etc/passwd", "é" * 5, "a" * 10_000, "8", "1e3", "__class__", "{{7*7}}"),
    *([], [1], [None], ["x"], [[2], [3]], [0.5, 0.5], [2, 3, 5, 6], {}, {"a": 1}, {"k": {"k": {}}}),
]


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


@dataclass(frozen=True)
class Mutant:
    """A folder with one thing wrong."""

    base: Base
    kind: str
    folder: Path


# --- good folders --------------------------------------------------------------------------------


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


# --- what is changed -----------------------------------------------------------------------------


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


# --- what was loaded -----------------------------------------------------------------------------

_X = torch.randn(256, len(BLOCKS), D, generator=torch.Generator().manual_seed(7)).double() * 3 + 1
_READ = {
    *("d_in", "d_sae", "k", "n_routed_layers", "routing", "aggregation", "routing_seed"),
    *("apply_b_dec_to_input", "rescale_acts_by_decoder_norm", "route_shares", "layer_shares"),
}


def accepted(sae: Any, mutant: Mutant) -> str:
    """`as saved`, `as the files say` (another legal value was written there), or what is wrong."""
    config = json.loads((mutant.folder / CFG).read_text())
    used = sae.state_dict().keys()  # SAELens leaves a `scaling_factor` of 1 out
    weights = {k: v for k, v in load_file(mutant.folder / WEIGHTS).items() if k in used}
    problem = _problem(sae, config, weights, mutant.base)
    if problem is not None:
        return f"inconsistent: {problem}"
    original, base = mutant.base.config, mutant.base.weights
    same = all(torch.equal(value.double(), base[name].double()) for name, value in weights.items())
    read = {*_READ, "architecture", "dtype"}
    same &= all(config.get(name) == original.get(name) for name in read)
    return "as saved" if same else "as the files say"


def _problem(
    sae: Any, config: dict[str, Any], weights: dict[str, torch.Tensor], base: Base
) -> str | None:
    """What an SAE has that its files do not say, or None."""
    original = base.config
    for name in _READ & original.keys():
        old_or_new = {"route_shares", "layer_shares"} if name.endswith("_shares") else {name}
        if not old_or_new & config.keys():
            return f"{name} is missing"
    digest = original["metadata"].get("weights_sha256")
    changed = any(
        name not in base.weights or not torch.equal(value.double(), base.weights[name].double())
        for name, value in weights.items()
    )
    if digest is not None and config["metadata"].get("weights_sha256") == digest and changed:
        return "weights differ from those that were saved"
    for name, value in sae.state_dict().items():
        if not torch.isfinite(value).all():
            return f"{name} is not finite"
        if not torch.equal(value, weights[name].to(value.dtype)):
            return f"{name} is not that of the file"
    return _metadata_problem(config) or _function_problem(sae, config, weights)


def _metadata_problem(config: dict[str, Any]) -> str | None:
    metadata, n_routes = config["metadata"], config["n_routed_layers"]
    blocks = []
    for key in ("hook_names", "routed_blocks", "routed_layers"):
        value = metadata.get(key)
        if value is not None:
            blocks.append([int(re.findall(r"\d+", str(each))[-1]) for each in value])
    if any(len(each) != n_routes or each != blocks[0] for each in blocks):
        return f"blocks {blocks} for n_routed_layers={n_routes}"
    hook = metadata.get("hook_name")
    if blocks and hook is not None and not hook.startswith(f"blocks.{blocks[0][-1]}."):
        return f"hook_name={hook} for blocks {blocks[0]}"
    kinds: dict[str, tuple[type, ...]] = {
        "context_size": (int,),
        "prepend_bos": (bool,),
        "model_name": (str,),
        "dataset_path": (str,),
        "exclude_special_tokens": (bool, list),
        "seqpos_slice": (list,),
        "model_from_pretrained_kwargs": (dict,),
    }
    for key, allowed in kinds.items():
        if metadata.get(key) is not None and type(metadata[key]) not in allowed:
            return f"{key}={metadata[key]!r}"
    return None


def _function_problem(
    sae: Any, config: dict[str, Any], weights: dict[str, torch.Tensor]
) -> str | None:
    """Compare with the formulas, computed in float64 from the files."""
    dtype = getattr(torch, config["dtype"])
    w = {name: value.to(dtype).double() for name, value in weights.items()}
    normed = (_X - _X.mean(-1, keepdim=True)) / (_X.std(-1, keepdim=True) + 1e-6)
    sae = sae.to(torch.float64)
    with torch.no_grad():
        acts = sae.encode_layers(_X)
        if config["architecture"].startswith("crosscoder"):
            x = normed.flatten(-2)
        else:
            x = _routed(sae, config, w, normed)
            if isinstance(x, str):
                return x
            acts = sae.encode(x)
        out = sae.decode(acts)
        expected = _encoded(config, w, x)
        reconstructed = _decoded(config, w, expected)
    if not _equal(acts, expected):
        return "another encoder"
    return None if _equal(out, reconstructed) else "another decoder"


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Up to rounding in float64; where one overflows (exp of a gate's size), so must the other."""
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()):
        return False
    return torch.allclose(a[finite], b[finite], rtol=1e-6, atol=1e-9)


def _routed(
    sae: Any, config: dict[str, Any], w: dict[str, torch.Tensor], normed: torch.Tensor
) -> torch.Tensor | str:
    pooled = normed.sum(-2)
    if config["aggregation"] == "mean":
        pooled = normed.mean(-2)
    elif config["aggregation"] == "attention":
        scores = (normed @ w["q_router"] / D**0.5).softmax(-1) * normed.shape[-2]
        pooled = (scores.unsqueeze(-1) * normed).sum(-2)
    p = (pooled @ w["W_router"]).softmax(-1)
    routing = sae.route(_X)
    if config["routing"] == "soft":
        return (p.unsqueeze(-1) * normed).sum(-2)
    if config["routing"] == "uniform":
        chosen, weight = routing.route, torch.ones(len(_X)).double()
        n_routes = config["n_routed_layers"]
        shares = config.get("route_shares") or config.get("layer_shares")
        drawn = torch.bincount(chosen, minlength=n_routes) / len(_X)
        wanted = torch.tensor(shares or [1 / n_routes] * n_routes)
        if (drawn - wanted).abs().max() > 0.15:  # five standard deviations
            return "other shares"
    else:
        chosen, weight = p.argmax(-1), p.amax(-1)
    x = weight.unsqueeze(-1) * normed[torch.arange(len(_X)), chosen]
    return (
        x
        if torch.allclose(routing.x_route, x, rtol=1e-6, atol=1e-9, equal_nan=True)
        else "another router"
    )


def _encoded(config: dict[str, Any], w: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    centered = x - w["b_dec"] * config["apply_b_dec_to_input"]
    architecture = config["architecture"]
    if architecture == "route_gated":
        gate = centered @ w["W_enc"] + w["b_gate"]
        size = centered @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]
        return torch.where(gate > 0, size.clamp(min=0), 0.0)
    pre = centered @ w["W_enc"] + w["b_enc"]
    if architecture == "route_jumprelu":
        return torch.where(pre > w["threshold"], pre.clamp(min=0), 0.0)
    if architecture.endswith("topk"):
        if config["rescale_acts_by_decoder_norm"]:
            pre = pre * w["W_dec"].norm(dim=-1)
        last = pre.sort(dim=-1, descending=True).values[..., config["k"] - 1, None]
        return torch.where(pre >= last, pre.clamp(min=0), 0.0)
    return pre.clamp(min=0)


def _decoded(
    config: dict[str, Any], w: dict[str, torch.Tensor], acts: torch.Tensor
) -> torch.Tensor:
    if config.get("rescale_acts_by_decoder_norm"):
        acts = acts / w["W_dec"].norm(dim=-1)
    return acts @ w["W_dec"] + w["b_dec"]


# --- what was said -------------------------------------------------------------------------------

_FILE = re.compile(r"cfg\.json|sae_weights\.safetensors|sparsity\.safetensors")
_FIELDS = {
    *_READ,
    *("architecture", "dtype", "metadata", "W_enc", "W_dec", "b_enc", "b_dec", "W_router"),
    *("q_router", "b_gate", "b_mag", "r_mag", "threshold", "sparsity", "normalize_activations"),
    *("reshape_activations", "sae_lens_version"),
}
_WHOLE_FILE = ("cannot be read", "no cfg.json there", "no sae_weights", "holds a ", "must hold")


def outcome(load: Callable[[Path], Any], mutant: Mutant) -> str:
    """What loading a mutant comes to.

    Returns:
        "refused", "refused without a name" (of file and field), what `accepted` says, "hang", or
        the name and text of another exception.
    """
    try:
        with time_limit(10):
            sae = load(mutant.folder)
    except UserError as error:
        named = names_file_and_field(str(error), str(mutant.folder))
        return "refused" if named else f"refused without a name: {error}"
    except TimeoutError:
        return "hang"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return accepted(sae, mutant)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block when the time is over."""

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def names_file_and_field(message: str, folder: str) -> bool:
    """Whether a message says which file, and which field, tensor or damage of the whole file."""
    rest = _FILE.sub("", message.replace(folder, ""))
    named = any(re.search(rf"\b{field}\b", rest) for field in _FIELDS)
    named |= any(text in message for text in _WHOLE_FILE) or "is no weight of the SAE" in message
    return _FILE.search(message) is not None and named and "\n" not in message
