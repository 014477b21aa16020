"""What loading a mutant comes to, and an independent judgment of what was loaded.

`accepted` says whether an SAE that was loaded from a mutant is what the files say: its function is
computed again here, in float64 and from the files alone.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sae_lens_route.errors import UserError
from support.mutants import Mutant
from support.saved_folders import BLOCKS, CFG, WEIGHTS, Base, D

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
    read = {*_READ, "architecture", "dtype", "scale_by_probability"}
    same &= all(config.get(name) == original.get(name) for name in read)
    return "as saved" if same else "as the files say"


def _problem(
    sae: Any, config: dict[str, Any], weights: dict[str, torch.Tensor], base: Base
) -> str | None:
    """What an SAE has that its files do not say, or None."""
    original = base.config
    # fields of the class only: the configuration may be another folder's, of another architecture
    for name in _READ & original.keys() & vars(sae.cfg).keys():
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
        if not config.get("scale_by_probability", True):
            weight = torch.ones_like(weight)
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
    has_norms = config["architecture"].endswith("topk")  # elsewhere SAELens drops the field
    if has_norms and config.get("rescale_acts_by_decoder_norm"):
        acts = acts / w["W_dec"].norm(dim=-1)
    return acts @ w["W_dec"] + w["b_dec"]


# --- what was said -------------------------------------------------------------------------------

_FILE = re.compile(r"cfg\.json|sae_weights\.safetensors|sparsity\.safetensors")
_FIELDS = {
    *_READ,
    *("architecture", "dtype", "metadata", "W_enc", "W_dec", "b_enc", "b_dec", "W_router"),
    *("q_router", "b_gate", "b_mag", "r_mag", "threshold", "sparsity", "normalize_activations"),
    *("reshape_activations", "sae_lens_version", "scale_by_probability"),
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
