"""A language model by official name, local folder or `demo`.

`model_class_name`, as in SAELens, chooses the kind of model (`kinds.py`):

| `model_class_name`     | what `load_model` returns        |
|------------------------|----------------------------------|
| `HookedTransformer`    | SAELens's `HookedSAETransformer` |
| `TransformerBridge`    | SAELens's `SAETransformerBridge` |
| `AutoModelForCausalLM` | SAELens's `HookedProxyLM`        |

Weights are never processed (no layer norm folded, nothing centered), so the residual streams are
those of the Hugging Face model. An official name is passed to the library unchanged. A folder is
read without a network call; TransformerLens refuses one as a `HookedTransformer`, so it is
converted here:

1. The configuration is taken from the folder's `config.json` (`hooked_config.py`).
2. TransformerLens's own converter renames the weights.
3. The result has to reproduce the logits of the Hugging Face model, or loading fails.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from packaging.version import Version
from sae_lens import HookedSAETransformer
from sae_lens.analysis.compat import has_transformer_bridge
from sae_lens.load_model import HookedProxyLM
from torch import nn
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.loading_from_pretrained import (
    get_pretrained_state_dict,
    make_model_alias_map,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from sae_lens_route.errors import UserError
from sae_lens_route.models.hooked_config import hooked_config
from sae_lens_route.models.kinds import LanguageModel
from sae_lens_route.models.names import (
    OTHER_CLASSES,
    first_line,
    local_folder,
    one_line_errors,
)
from sae_lens_route.models.trust import PROCESSING, require_harmless, require_no_code

MODEL_CLASS_NAMES = ("HookedTransformer", "TransformerBridge", "AutoModelForCausalLM")

_CHECK_TOKENS = 64

_CHECK_TOLERANCE = 1e-2
"""Largest difference of a logit, in standard deviations of the logits. In float32 two correct
implementations differ by 1e-5; a wrong rotary base or a dropped bias causes 0.1 to several. In
bfloat16 even correct ones can differ by 1, so half precision is cast after the check."""

_TRANSFORMERS = Version(version("transformers")).release

_DTYPE_KEYWORD = "dtype" if _TRANSFORMERS >= (4, 56) else "torch_dtype"


def load_model(
    model_name: str,
    model_class_name: str = "HookedTransformer",
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    hook_names: list[str] | None = None,
    trust_remote_code: bool = False,
    **from_pretrained_kwargs: Any,
) -> LanguageModel:
    """Load a language model, its weights unprocessed and its tokenizer at `model.tokenizer`.

    Args:
        model_name: "demo" for the embedded model or a folder with a `config.json` (neither needs
            the network), or an official TransformerLens name, for the other two classes any name on
            the Hugging Face Hub. Another folder called demo is "./demo".
        model_class_name: "HookedTransformer", "TransformerBridge" or "AutoModelForCausalLM".
        device: device of the model.
        dtype: of the weights, whatever the files hold. A folder becomes a "HookedTransformer" by
            way of float32, which takes 8 bytes of main memory per parameter.
        hook_names: for "AutoModelForCausalLM" only, the modules that get a hook (by default all,
            which breaks up `torch.compile`).
        trust_remote_code: run code that comes with the model, if its configuration asks for it.
            Otherwise such a model is refused.
        from_pretrained_kwargs: passed to the library that loads the model. For a folder read as
            "HookedTransformer": `n_ctx` (default: the model's, at most 2,048), `n_devices`,
            `default_prepend_bos` and `default_padding_side` as in TransformerLens; the others are
            passed to `AutoModelForCausalLM.from_pretrained`.

    Raises:
        UserError: a name, folder, class or dtype that cannot be used, or a folder that
            TransformerLens does not convert faithfully. The message names the value and the way
            out.
    """
    if model_class_name not in MODEL_CLASS_NAMES:
        raise UserError(
            f"model_class_name={model_class_name!r} is none of {', '.join(MODEL_CLASS_NAMES)}"
        )
    if model_class_name == "TransformerBridge" and not has_transformer_bridge():
        raise UserError(
            "model_class_name='TransformerBridge' needs transformer-lens >= 3 "
            f"({version('transformer-lens')} is installed): upgrade it, or use "
            "'AutoModelForCausalLM' or 'HookedTransformer'"
        )
    torch_dtype = _torch_dtype(from_pretrained_kwargs.pop("torch_dtype", dtype))
    # always said: left open, transformers asks at the terminal whether to run the code
    kwargs = {**from_pretrained_kwargs, "trust_remote_code": trust_remote_code}
    with one_line_errors(model_name):
        folder = local_folder(model_name, model_class_name)
        if folder is not None and not trust_remote_code:
            require_no_code(model_name, folder)
        if folder is None:
            return _load_by_name(
                model_name, model_class_name, device, torch_dtype, hook_names, kwargs
            )
        return _load_folder(folder, model_class_name, device, torch_dtype, hook_names, kwargs)


def load_named_model(
    model_name: str | None,
    model_class_name: str | None,
    options: dict[str, Any] | None,
    *,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Load the language model that a saved SAE's `cfg.json` names; no code of the model runs.

    Args:
        model_name: `metadata.model_name`.
        model_class_name: `metadata.model_class_name`; None means "HookedTransformer".
        options: `metadata.model_from_pretrained_kwargs`; only those of `trust.py` are taken.
        device: Device of the model.
        trust_remote_code: take whatever the file says, and run the model's code if it asks for it.

    Raises:
        UserError: as `load_model`, or the file asks for something that could run code.
    """
    if not model_name:
        raise UserError(
            "cfg.json: metadata.model_name is missing: name the model yourself (--model-name, "
            "model_name=)"
        )
    kind, kwargs = model_class_name or "HookedTransformer", dict(options or {})
    if trust_remote_code:
        return load_model(model_name, kind, device=device, **{**kwargs, "trust_remote_code": True})
    if kind in MODEL_CLASS_NAMES:
        require_harmless(model_name, kind, kwargs)
    if kind == "AutoModelForCausalLM":
        kwargs["use_safetensors"] = True
    return load_model(model_name, kind, device=device, **kwargs)


def model_width(model_name: str, model_class_name: str = "HookedTransformer") -> int:
    """`d_model` of a model that is not loaded: only its configuration is read.

    Raises:
        UserError: as `load_model` does for a name that cannot be used.
    """
    official_names = make_model_alias_map()  # aliases in lower case -> names on the Hub
    with one_line_errors(model_name):
        folder = local_folder(model_name, model_class_name)
        name = str(folder) if folder else official_names.get(model_name.lower(), model_name)
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        width = getattr(config.get_text_config(), "hidden_size", None)
        if width is None:
            raise UserError(f"model_name={model_name!r}: config.json has no hidden_size; give d_in")
        return width


def _torch_dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(
            f"dtype={dtype!r} is not a floating-point type; use 'float32', 'bfloat16', 'float16' "
            "or 'float64'"
        )
    return found


def _load_by_name(
    model_name: str,
    model_class_name: str,
    device: str | torch.device,
    dtype: torch.dtype,
    hook_names: list[str] | None,
    kwargs: dict[str, Any],
) -> LanguageModel:
    """Let the library load it; `model_name` may be a folder too, except for HookedTransformer."""
    kwargs = dict(kwargs)
    trusted = {"trust_remote_code": kwargs.pop("trust_remote_code")}
    if model_class_name == "HookedTransformer":
        if trusted["trust_remote_code"]:  # otherwise TransformerLens decides by the official name
            kwargs = {**kwargs, **trusted}
        return HookedSAETransformer.from_pretrained_no_processing(
            model_name, device=device, dtype=dtype, **kwargs
        )
    if model_class_name == "TransformerBridge":
        from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

        if not {"device_map", "n_devices"} & kwargs.keys():
            kwargs = {**kwargs, "device": device}
        return cast(
            "LanguageModel",
            SAETransformerBridge.boot_transformers(model_name, dtype=dtype, **kwargs, **trusted),
        )
    revision = {"revision": kwargs["revision"]} if "revision" in kwargs else {}
    tokenizer = kwargs.pop("tokenizer", None) or AutoTokenizer.from_pretrained(
        model_name, **revision, **trusted
    )
    hf_model: Any = AutoModelForCausalLM.from_pretrained(
        model_name, **{**kwargs, _DTYPE_KEYWORD: dtype}, **trusted
    )
    if kwargs.get("device_map") is None:  # else its parts are where they belong
        hf_model = hf_model.to(device)
    return HookedProxyLM(hf_model, tokenizer, hook_names=hook_names)


def _load_folder(
    folder: Path,
    model_class_name: str,
    device: str | torch.device,
    dtype: torch.dtype,
    hook_names: list[str] | None,
    kwargs: dict[str, Any],
) -> LanguageModel:
    trust_remote_code = kwargs["trust_remote_code"]
    tokenizer = _load_tokenizer(folder, trust_remote_code)
    # TransformerLens prepends EOS where a tokenizer has no BOS, which a model that was trained
    # without one (Qwen) has never seen
    has_bos = tokenizer.bos_token is not None
    if model_class_name == "HookedTransformer":
        return _convert_folder(
            folder, tokenizer, device, dtype, {"default_prepend_bos": has_bos, **kwargs}
        )
    if model_class_name == "TransformerBridge":
        kwargs = {**kwargs, "tokenizer": tokenizer}
        model = _load_by_name(str(folder), model_class_name, device, dtype, None, kwargs)
        cast("Any", model).cfg.default_prepend_bos = has_bos
        return model
    config = _load_config(folder, trust_remote_code)
    kwargs = {**kwargs, "config": config, "tokenizer": tokenizer, "local_files_only": True}
    return _load_by_name(str(folder), model_class_name, device, dtype, hook_names, kwargs)


def _load_tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, its `add_bos_token` set if it prepends BOS.

    TransformerLens and HookedProxyLM rely on `add_bos_token`, which a PreTrainedTokenizerFast with
    a BOS template may lack: one would load the tokenizer again, the other leave the BOS in.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, TypeError) as error:
        if "trust_remote_code" in str(error):
            raise
        raise UserError(
            f"model_name={str(folder)!r}: no usable tokenizer in this folder "
            f"({first_line(error)}); add one with tokenizer.save_pretrained"
        ) from error
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer("a")["input_ids"][:1] == [bos]:
        tokenizer.init_kwargs["add_bos_token"] = True
        tokenizer.add_bos_token = True
    return tokenizer


def _load_config(folder: Path, trust_remote_code: bool) -> Any:
    """The folder's Hugging Face configuration.

    Transformers 4 ignores the `rope_parameters` that transformers 5 writes, and would use a rotary
    base of 10,000, so the values are copied to the attributes it reads.
    """
    config: Any = AutoConfig.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=trust_remote_code
    )
    rope = getattr(config, "rope_parameters", None)
    if _TRANSFORMERS < (5,) and rope and "rope_theta" in rope:
        config.rope_theta = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            config.rope_scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
        if "partial_rotary_factor" in rope:
            config.partial_rotary_factor = rope["partial_rotary_factor"]
    return config


def _convert_folder(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    device: str | torch.device,
    dtype: torch.dtype,
    kwargs: dict[str, Any],
) -> HookedSAETransformer:
    kwargs = dict(kwargs)
    asked = [name for name in PROCESSING if kwargs.pop(name, False)]
    if asked:
        raise UserError(
            f"{asked[0]}=True: the weights of a folder are not processed, so that residual streams "
            "are those of the Hugging Face model; leave it out"
        )
    padding_side = kwargs.pop("default_padding_side", None) or tokenizer.padding_side
    chosen = {
        name: kwargs.pop(name)
        for name in ("n_ctx", "n_devices", "default_prepend_bos")
        if name in kwargs
    }
    hf_config = _load_config(folder, kwargs["trust_remote_code"])
    checked_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    # eager: transformers 4 ignores Gemma 2's soft cap and GPT-2's scaling by block under SDPA
    kwargs.setdefault("attn_implementation", "eager")
    kwargs |= {_DTYPE_KEYWORD: checked_dtype, "config": hf_config, "local_files_only": True}
    hf_model = AutoModelForCausalLM.from_pretrained(str(folder), **kwargs).eval()
    try:
        # on the CPU, next to the Hugging Face model, until it is checked
        on_cpu = {"device": "cpu", "dtype": checked_dtype, "init_weights": False}
        fields = {"model_name": folder.name, **hooked_config(hf_config), **on_cpu, **chosen}
        cfg = HookedTransformerConfig.from_dict(fields)
        model = HookedSAETransformer(cfg, move_to_device=False)
        weights = get_pretrained_state_dict(str(folder), cfg, hf_model, dtype=checked_dtype)
        # not load_and_process_state_dict: in 3.x it rounds float64 to float32, and is quadratic
        model.load_state_dict(model.fill_missing_keys(weights), strict=False)
        error = _logit_error(model, hf_model)
    except Exception as failure:  # whatever the converter fails on, the way out is the same
        raise UserError(
            f"model_name={str(folder)!r}: TransformerLens cannot convert this model "
            f"({first_line(failure)}); {OTHER_CLASSES}"
        ) from failure
    if not error <= _CHECK_TOLERANCE:  # also true of nan
        raise UserError(
            f"model_name={str(folder)!r}: converted to HookedTransformer, its logits are off by "
            f"{error:.2g} of their standard deviation ({_CHECK_TOLERANCE} allowed); {OTHER_CLASSES}"
        )
    model.set_tokenizer(tokenizer, default_padding_side=padding_side)
    cfg.tokenizer_name = str(folder)
    cfg.dtype, cfg.device = dtype, str(device)
    nn.Module.to(model, dtype)  # TransformerLens's own .to() is quadratic in the parameters
    model.move_model_modules_to_device()
    return model


@torch.no_grad()
def _logit_error(model: HookedTransformer, hf_model: nn.Module) -> float:
    """Largest difference from the Hugging Face logits, in their standard deviations."""
    shape = (1, min(_CHECK_TOKENS, model.cfg.n_ctx))
    tokens = torch.randint(model.cfg.d_vocab, shape, generator=torch.Generator().manual_seed(0))
    theirs = hf_model(tokens, use_cache=False).logits.float()
    ours = model(tokens).float()
    return float((ours - theirs).abs().max() / theirs.std())
