"""A language model by official name, local folder or `demo`.

Three kinds of model, named as SAELens names them (`model_class_name`):

| `model_class_name` | what `load_model` returns | residual stream after block 3 |
|---|---|---|
| `HookedTransformer` | SAELens's `HookedSAETransformer` | `blocks.3.hook_resid_post` |
| `TransformerBridge` | SAELens's `SAETransformerBridge` | `blocks.3.hook_out` |
| `AutoModelForCausalLM` | SAELens's `HookedProxyLM` | `model.layers.3`, `transformer.h.3`, … |

Weights are never processed (no layer norm folded, nothing centred), so the residual streams are
those of the Hugging Face model. An official name is handed to the library unchanged. A folder is
read with no network call; TransformerLens refuses one as a `HookedTransformer`, so the conversion
is done here:

1. The configuration is taken from the folder's `config.json`. (TransformerLens would guess the
   family from words in the *path*, and its 2.x ignores `rope_theta` and `rope_scaling`.)
2. TransformerLens's own converter renames the weights.
3. The result has to give the logits of the Hugging Face model, or loading fails.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from packaging.version import Version
from sae_lens import HookedSAETransformer
from sae_lens.analysis.compat import has_transformer_bridge
from sae_lens.load_model import HookedProxyLM
from sae_lens.load_model import load_model as sae_lens_load_model
from torch import nn
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.loading_from_pretrained import (
    get_pretrained_state_dict,
    make_model_alias_map,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

if TYPE_CHECKING:
    # A bridge offers the interface of HookedRootModule without being one, so at run time (where
    # beartype looks) only nn.Module is true of all three kinds.
    from transformer_lens.HookedTransformer import HookedRootModule as LanguageModel
else:
    LanguageModel = nn.Module

DEMO_FOLDER: Path = Path(__file__).parent / "demo"
"""The embedded demo model, in Hugging Face Llama layout; `load_model("demo")` reads it."""

MODEL_CLASS_NAMES = ("HookedTransformer", "TransformerBridge", "AutoModelForCausalLM")

_N_CTX_LIMIT = 2048
"""Context of a converted folder unless `n_ctx` is given; TransformerLens's own for Llama 3.2. Its
2.x keeps an `[n_ctx, n_ctx]` mask in every block, 16 GiB each at that model's 131,072 tokens."""

_CHECK_TOKENS = 64
_CHECK_TOLERANCE = 1e-2
"""Largest difference of a logit, in standard deviations of the logits. In float32 two correct
implementations differ by 1e-5, a wrong rotary base or a dropped bias makes 0.1 to several. In
bfloat16 the correct ones too can differ by 1, so half precision is cast after the check."""

_WAY_OUT = (
    "use model_class_name='AutoModelForCausalLM', or 'TransformerBridge' (transformer-lens >= 3)"
)
_PROCESSING = (
    "fold_ln",
    "center_writing_weights",
    "center_unembed",
    "fold_value_biases",
    "refactor_factored_attn_matrices",
)
_ARCHITECTURES = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_TRANSFORMERS = Version(version("transformers")).release
_DTYPE_KEYWORD = "dtype" if _TRANSFORMERS >= (4, 56) else "torch_dtype"


def load_model(
    model_name: str,
    model_class_name: str = "HookedTransformer",
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    hook_names: list[str] | None = None,
    **from_pretrained_kwargs: Any,
) -> LanguageModel:
    """Load a language model, its weights unprocessed and its tokenizer at `model.tokenizer`.

    Args:
        model_name: "demo" for the embedded model, a folder with a `config.json` (no network call is
            made for either), or an official TransformerLens name, for the other two classes any
            name on the Hugging Face Hub. Write a folder of your own called demo as "./demo".
        model_class_name: "HookedTransformer", "TransformerBridge" or "AutoModelForCausalLM".
        device: where the model goes.
        dtype: of the weights, whatever the files hold. A folder becomes a "HookedTransformer" by
            way of float32, which takes 8 bytes of main memory per parameter.
        hook_names: for "AutoModelForCausalLM" only, the modules that get a hook (without it all of
            them, which breaks up `torch.compile`).
        from_pretrained_kwargs: handed to the library that loads the model. For a folder read as
            "HookedTransformer": `n_ctx` (default: the model's, at most 2,048), `n_devices`,
            `default_prepend_bos` and `default_padding_side` as in TransformerLens, the rest goes to
            `AutoModelForCausalLM.from_pretrained`.

    Raises:
        ValueError: a name, folder, class or dtype that cannot be used, or a folder that
            TransformerLens does not convert faithfully. The message says which and the way out.
    """
    if model_class_name not in MODEL_CLASS_NAMES:
        raise ValueError(
            f"model_class_name={model_class_name!r} is none of {', '.join(MODEL_CLASS_NAMES)}"
        )
    if model_class_name == "TransformerBridge" and not has_transformer_bridge():
        raise ValueError(
            "model_class_name='TransformerBridge' needs transformer-lens >= 3 "
            f"({version('transformer-lens')} is installed): upgrade it, or use "
            "'AutoModelForCausalLM' or 'HookedTransformer'"
        )
    torch_dtype = _torch_dtype(from_pretrained_kwargs.pop("torch_dtype", dtype))
    folder = _local_folder(model_name, model_class_name)
    if folder is None:
        with _one_line_hub_errors(model_name):
            return _load_by_name(
                model_name,
                model_class_name,
                device,
                torch_dtype,
                hook_names,
                from_pretrained_kwargs,
            )
    return _load_folder(
        folder, model_class_name, device, torch_dtype, hook_names, from_pretrained_kwargs
    )


def n_layers(model: LanguageModel) -> int:
    """How many blocks the model has."""
    if isinstance(model, HookedProxyLM):
        return _text_config(model).num_hidden_layers
    return cast("Any", model).cfg.n_layers


def d_model(model: LanguageModel) -> int:
    """Width of the residual stream."""
    if isinstance(model, HookedProxyLM):
        return _text_config(model).hidden_size
    return cast("Any", model).cfg.d_model


def model_width(model_name: str, model_class_name: str = "HookedTransformer") -> int:
    """`d_model` of a model that is not loaded: only its configuration is read.

    Raises:
        ValueError: as `load_model` does for a name that cannot be used.
    """
    folder = _local_folder(model_name, model_class_name)
    official_names = make_model_alias_map()  # aliases in lower case -> names on the Hub
    name = str(folder) if folder else official_names.get(model_name.lower(), model_name)
    with _one_line_hub_errors(model_name):
        return AutoConfig.from_pretrained(name).get_text_config().hidden_size


def decoder_blocks(model: LanguageModel) -> list[nn.Module]:
    """The modules whose output is the residual stream after each block, in order.

    The output is a tensor `[batch, pos, d_model]`, or in some Hugging Face models of transformers 4
    a tuple that starts with it.
    """
    if isinstance(model, HookedProxyLM):
        return list(_proxy_blocks(model)[1])
    return list(cast("Any", model).blocks)


def residual_hook_names(model: LanguageModel, layers: Sequence[int]) -> list[str]:
    """Names of the residual stream after the blocks `layers`, as this kind of model spells them.

    Raises:
        ValueError: a layer that the model does not have.
    """
    n = n_layers(model)
    outside = [layer for layer in layers if not 0 <= layer < n]
    if outside:
        raise ValueError(
            f"routed_layers={list(layers)}: {outside} out of range, "
            f"the model has blocks 0 to {n - 1}"
        )
    if isinstance(model, HookedProxyLM):
        name, _ = _proxy_blocks(model)
        return [f"{name}.{layer}" for layer in layers]
    suffix = "hook_resid_post" if isinstance(model, HookedTransformer) else "hook_out"
    return [f"blocks.{layer}.{suffix}" for layer in layers]


def default_routed_layers(n_layers: int) -> list[int]:
    """Blocks `n//4 - 1 … 3n//4 - 1`, the paper's choice (3 to 11 of 16); block 0 at the least.

    Raises:
        ValueError: `n_layers` below 1.
    """
    if n_layers < 1:
        raise ValueError(f"n_layers={n_layers} must be at least 1")
    first, last = n_layers // 4 - 1, 3 * n_layers // 4 - 1
    return list(range(max(first, 0), max(last, 0) + 1))


# --- names and folders ---------------------------------------------------------------------------


def _local_folder(model_name: str, model_class_name: str) -> Path | None:
    """The folder that `model_name` means, or None when it is a name for the library to resolve."""
    folder = DEMO_FOLDER if model_name == "demo" else Path(model_name).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if folder.exists():  # transformers, too, takes it before the official model of that name
        raise ValueError(
            f"model_name={model_name!r}: no config.json in {folder}; pass a folder written by "
            "save_pretrained, an official name or 'demo'"
        )
    separators = [separator for separator in (os.sep, os.altsep) if separator]
    is_path = model_name.startswith((".", "~")) or any(sep in model_name for sep in separators)
    looks_like_org_name = re.fullmatch(r"\w[\w.-]*/[\w.-]+", model_name) is not None
    if is_path and not looks_like_org_name:
        raise ValueError(
            f"model_name={model_name!r}: there is no such folder; pass a folder written by "
            "save_pretrained, an official name or 'demo'"
        )
    official_names = make_model_alias_map()  # TransformerLens's, aliases included, lower case
    if model_class_name == "HookedTransformer" and model_name.lower() not in official_names:
        close = ", ".join(difflib.get_close_matches(model_name.lower(), official_names, n=3))
        raise ValueError(
            f"model_name={model_name!r} is neither a folder nor an official TransformerLens name"
            f"{f' (similar: {close})' if close else ''}; pass one of these or 'demo', or for any "
            f"model of the Hugging Face Hub {_WAY_OUT}"
        )
    return None


@contextmanager
def _one_line_hub_errors(model_name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # what transformers raises for an unknown name and for no network
        raise ValueError(
            f"model_name={model_name!r} could not be loaded by that name ({_first_line(error)}); "
            "check the spelling and the network, or pass a local folder or 'demo', which need none"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _torch_dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(
            f"dtype={dtype!r} is not a floating-point type; use 'float32', 'bfloat16', 'float16' "
            "or 'float64'"
        )
    return found


# --- loading -------------------------------------------------------------------------------------


def _load_by_name(
    model_name: str,
    model_class_name: str,
    device: str | torch.device,
    dtype: torch.dtype,
    hook_names: list[str] | None,
    kwargs: dict[str, Any],
) -> LanguageModel:
    """Leave it to the library; `model_name` may be a folder too, except for HookedTransformer."""
    if model_class_name == "HookedTransformer":
        return HookedSAETransformer.from_pretrained_no_processing(
            model_name, device=device, dtype=dtype, **kwargs
        )
    if model_class_name == "TransformerBridge":
        from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

        if not {"device_map", "n_devices"} & kwargs.keys():
            kwargs = {**kwargs, "device": device}
        return cast(
            "LanguageModel",
            SAETransformerBridge.boot_transformers(model_name, dtype=dtype, **kwargs),
        )
    return sae_lens_load_model(
        "AutoModelForCausalLM",
        model_name,
        device=device,
        model_from_pretrained_kwargs={**kwargs, _DTYPE_KEYWORD: dtype},
        hook_names=hook_names,
    )


def _load_folder(
    folder: Path,
    model_class_name: str,
    device: str | torch.device,
    dtype: torch.dtype,
    hook_names: list[str] | None,
    kwargs: dict[str, Any],
) -> LanguageModel:
    tokenizer = _load_tokenizer(folder)
    # TransformerLens puts EOS where a tokenizer has no BOS; a model that was trained without one
    # (Qwen) should not meet it.
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
    kwargs = {**kwargs, "config": _load_config(folder), "local_files_only": True}
    model = _load_by_name(str(folder), model_class_name, device, dtype, hook_names, kwargs)
    cast("Any", model).tokenizer = tokenizer
    return model


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, saying truthfully whether it puts BOS in front by itself.

    TransformerLens and HookedProxyLM go by `add_bos_token`, which a PreTrainedTokenizerFast with a
    BOS template need not have: one would load the tokenizer anew, the other leave the BOS in.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"model_name={str(folder)!r}: no usable tokenizer in this folder "
            f"({_first_line(error)}); add one with tokenizer.save_pretrained"
        ) from error
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer("a")["input_ids"][:1] == [bos]:
        tokenizer.init_kwargs["add_bos_token"] = True
        tokenizer.add_bos_token = True
    return tokenizer


def _load_config(folder: Path) -> Any:
    """The folder's Hugging Face configuration.

    Transformers 4 reads over the `rope_parameters` that transformers 5 writes, and would go on with
    a rotary base of 10,000: the values are put where it looks for them.
    """
    config: Any = AutoConfig.from_pretrained(str(folder), local_files_only=True)
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
    asked = [name for name in _PROCESSING if kwargs.pop(name, False)]
    if asked:
        raise ValueError(
            f"{asked[0]}=True: the weights of a folder are not processed, so that residual streams "
            "are those of the Hugging Face model; leave it out"
        )
    padding_side = kwargs.pop("default_padding_side", None) or tokenizer.padding_side
    chosen = {
        name: kwargs.pop(name)
        for name in ("n_ctx", "n_devices", "default_prepend_bos")
        if name in kwargs
    }
    hf_config = _load_config(folder)
    checked_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    # eager: transformers 4 forgets Gemma 2's soft cap and GPT-2's scaling by block under SDPA
    kwargs.setdefault("attn_implementation", "eager")
    kwargs |= {_DTYPE_KEYWORD: checked_dtype, "config": hf_config, "local_files_only": True}
    hf_model = AutoModelForCausalLM.from_pretrained(str(folder), **kwargs).eval()
    try:
        # on the CPU, next to the Hugging Face model, until it is checked
        here = {"device": "cpu", "dtype": checked_dtype, "init_weights": False}
        fields = {"model_name": folder.name, **_hooked_config(hf_config), **here, **chosen}
        cfg = HookedTransformerConfig.from_dict(fields)
        model = HookedSAETransformer(cfg, move_to_device=False)
        weights = get_pretrained_state_dict(str(folder), cfg, hf_model, dtype=checked_dtype)
        # not load_and_process_state_dict: in 3.x it rounds float64 to float32, and is quadratic
        model.load_state_dict(model.fill_missing_keys(weights), strict=False)
        error = _logit_error(model, hf_model)
    except Exception as failure:  # whatever the converter tripped over, the way out is the same
        raise ValueError(
            f"model_name={str(folder)!r}: TransformerLens cannot convert this model "
            f"({_first_line(failure)}); {_WAY_OUT}"
        ) from failure
    if not error <= _CHECK_TOLERANCE:  # also true of nan
        raise ValueError(
            f"model_name={str(folder)!r}: converted to HookedTransformer, its logits are off by "
            f"{error:.2g} of their standard deviation ({_CHECK_TOLERANCE} allowed); {_WAY_OUT}"
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


# --- configurations ------------------------------------------------------------------------------


def _hooked_config(hf_config: Any) -> dict[str, Any]:
    """The fields of a HookedTransformerConfig that describe this Hugging Face configuration.

    Raises:
        ValueError: a family, or a kind of rotary embedding, that is not among those known here.
    """
    family = hf_config.model_type
    if family not in _ARCHITECTURES:
        raise ValueError(f"model_type={family!r} is none of {', '.join(_ARCHITECTURES)}")
    fields = {
        "original_architecture": _ARCHITECTURES[family],
        "d_model": hf_config.hidden_size,
        "n_layers": hf_config.num_hidden_layers,
        "n_heads": hf_config.num_attention_heads,
        "d_head": getattr(hf_config, "head_dim", None)
        or hf_config.hidden_size // hf_config.num_attention_heads,
        "d_vocab": hf_config.vocab_size,
        "n_ctx": min(hf_config.max_position_embeddings, _N_CTX_LIMIT),
    }
    if family == "gpt2":
        return fields | {
            "d_mlp": hf_config.n_inner or 4 * hf_config.hidden_size,
            "act_fn": hf_config.activation_function,
            "normalization_type": "LN",
            "eps": hf_config.layer_norm_epsilon,
            "use_attn_scale": hf_config.scale_attn_weights,
            "scale_attn_by_inverse_layer_idx": hf_config.scale_attn_by_inverse_layer_idx,
        }
    activation = "hidden_activation" if family == "gemma2" else "hidden_act"
    fields |= {"d_mlp": hf_config.intermediate_size, "act_fn": getattr(hf_config, activation)}
    fields |= _rotary_fields(hf_config, fields["d_head"])
    if family == "gpt_neox":
        return fields | {
            "normalization_type": "LN",
            "eps": hf_config.layer_norm_eps,
            "parallel_attn_mlp": hf_config.use_parallel_residual,
        }
    n_key_value_heads = hf_config.num_key_value_heads
    if family in ("llama", "qwen3") and n_key_value_heads == fields["n_heads"]:
        n_key_value_heads = None  # plain attention; the other families' converters want the number
    fields |= {
        "normalization_type": "RMS",
        "final_rms": True,
        "eps": hf_config.rms_norm_eps,
        "gated_mlp": True,
        "n_key_value_heads": n_key_value_heads,
        "use_qk_norm": family == "qwen3",
    }
    fields |= _sliding_window_fields(hf_config)
    if family == "gemma2":
        fields |= {
            "attn_scale": hf_config.query_pre_attn_scalar**0.5,
            "use_normalization_before_and_after": True,
        }
        if hf_config.attn_logit_softcapping is not None:
            fields["attn_scores_soft_cap"] = hf_config.attn_logit_softcapping
        if hf_config.final_logit_softcapping is not None:
            fields["output_logits_soft_cap"] = hf_config.final_logit_softcapping
    return fields


def _rotary_fields(hf_config: Any, d_head: int) -> dict[str, Any]:
    # transformers 5 keeps all of it in rope_parameters, 4 in attributes and in rope_scaling
    rope: dict[str, Any] = {
        "rope_theta": getattr(hf_config, "rope_theta", None),
        "partial_rotary_factor": getattr(hf_config, "partial_rotary_factor", None),
        **(getattr(hf_config, "rope_scaling", None) or {}),
        **(getattr(hf_config, "rope_parameters", None) or {}),
    }
    fields = {
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": False,
        "rotary_base": rope["rope_theta"],
        "rotary_dim": int(d_head * (rope["partial_rotary_factor"] or 1.0)),
    }
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return fields
    if kind != "llama3":
        raise ValueError(f"rotary embeddings of rope_type={kind!r}")
    return fields | {
        "use_NTK_by_parts_rope": True,
        "NTK_by_parts_factor": rope["factor"],
        "NTK_by_parts_low_freq_factor": rope["low_freq_factor"],
        "NTK_by_parts_high_freq_factor": rope["high_freq_factor"],
        "NTK_original_ctx_len": rope["original_max_position_embeddings"],
    }


def _sliding_window_fields(hf_config: Any) -> dict[str, Any]:
    window = getattr(hf_config, "sliding_window", None)
    layer_types = getattr(hf_config, "layer_types", None) or []
    if not layer_types and hf_config.model_type == "mistral":  # one window for all blocks
        layer_types = ["sliding_attention"] * hf_config.num_hidden_layers
    if window is None or "sliding_attention" not in layer_types:
        return {}
    return {
        "use_local_attn": True,
        "window_size": window,
        "attn_types": ["local" if t == "sliding_attention" else "global" for t in layer_types],
    }


# --- Hugging Face models -------------------------------------------------------------------------


def _text_config(model: HookedProxyLM) -> Any:
    return cast("Any", model.model).config.get_text_config()


def _proxy_blocks(model: HookedProxyLM) -> tuple[str, nn.ModuleList]:
    """The decoder's list of blocks and its name; lists of experts and vision towers lie deeper."""
    n = _text_config(model).num_hidden_layers
    found = [
        (name, module)
        for name, module in model.model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n
    ]
    if not found:
        raise ValueError(
            f"no list of {n} blocks in {type(model.model).__name__}; RouteSAE needs a model whose "
            "blocks are one nn.ModuleList"
        )
    return min(found, key=lambda item: item[0].count("."))
