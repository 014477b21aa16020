"""What a saved SAE's `cfg.json`, or a checkpoint's `runner_cfg.json`, may say about its language
model: a stranger may have written it.

A name and a few options may be taken from such a file, because none of them runs code:

| option                                     | values                                           |
|--------------------------------------------|--------------------------------------------------|
| `dtype`, `torch_dtype`                     | float32, float64, bfloat16, float16              |
| `revision`                                 | text                                             |
| `n_ctx`, `n_devices`                       | a positive number                                |
| `default_prepend_bos`, `low_cpu_mem_usage` | true, false                                      |
| `default_padding_side`                     | left, right                                      |
| `attn_implementation`                      | eager, sdpa, flash_attention_2, _3, flex_attention |
| `fold_ln` and the like                     | false: weights are never processed               |

Every other option is refused by name. So is a model whose loading would run or fetch code, whatever
the options: names for which TransformerLens sets `trust_remote_code` by itself, weights that are
pickles, a `custom_generate` folder, attention kernels from the Hub, adapters, and models with more
than a text decoder, for which TransformerLens installs packages.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from transformer_lens import loading_from_pretrained
from transformers import PretrainedConfig

from sae_lens_route.errors import UserError
from sae_lens_route.models.names import local_folder, one_line_errors

PROCESSING = (
    "fold_ln",
    "center_writing_weights",
    "center_unembed",
    "fold_value_biases",
    "refactor_factored_attn_matrices",
)
"""Options of TransformerLens that would change the residual stream."""


class Source(NamedTuple):
    """A file that names a model, as messages name it."""

    prefix: str
    way_out: str


SAVED_SAE = Source(
    "cfg.json: metadata.",
    "name a model yourself (--model-name, model_name=), or, if you trust the authors of the SAE and"
    " of the model, use --trust-remote-code (trust_remote_code=True)",
)
CHECKPOINT = Source(
    "runner_cfg.json: ",
    "if you trust it, give it yourself (--model-name, --model-from-pretrained-kwargs)",
)

_DTYPES = ("float32", "float64", "bfloat16", "float16")
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
_EXPERTS = ("eager", "grouped_mm", "batched_mm")
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def _is_one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: any(type(value) is type(each) and value == each for each in values)


def _is_dtype(value: Any) -> bool:
    return isinstance(value, str) and value.removeprefix("torch.") in _DTYPES


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


_HARMLESS: dict[str, Callable[[Any], bool]] = {
    "dtype": _is_dtype,
    "torch_dtype": _is_dtype,
    "revision": lambda value: isinstance(value, str),
    "n_ctx": _is_count,
    "n_devices": _is_count,
    "default_prepend_bos": _is_one_of(True, False),
    "low_cpu_mem_usage": _is_one_of(True, False),
    "default_padding_side": _is_one_of("left", "right"),
    "attn_implementation": _is_one_of(*_ATTENTION),
    **dict.fromkeys(PROCESSING, _is_one_of(False)),
}


class _CouldRunCode(Exception):
    pass


def require_harmless(
    model_name: str | None,
    model_class_name: str,
    options: Mapping[str, Any],
    source: Source = SAVED_SAE,
) -> None:
    """Check that loading a model as a file says runs no code.

    Args:
        model_name: The name in the file; None if the user gave one.
        model_class_name: "HookedTransformer", "TransformerBridge" or "AutoModelForCausalLM".
        options: Options for loading it that were read from the file.
        source: The file.

    Raises:
        UserError: It could; or the model is on the Hub, which does not know the name or cannot be
            reached.
    """
    try:
        _check_options(options)
        if model_name is not None:
            with one_line_errors(model_name):
                _check_model(model_name, model_class_name, options.get("revision"))
    except _CouldRunCode as error:
        raise UserError(
            f"{source.prefix}{error}, because it could run code: {source.way_out}"
        ) from error


def require_no_code(model_name: str, folder: Path) -> None:
    """Check a model folder that the user named for code that is run without being asked to.

    Other code, such as `auto_map` names, is not run by the libraries unless they are told to.

    Raises:
        UserError: It names kernels of the Hub, or has a loop of its own for generation.
    """
    try:
        _check_code(model_name, folder, _raw_config(str(folder), None))
    except _CouldRunCode as error:
        raise UserError(
            f"{error}, because it could run code: choose another model, or, if you trust its "
            "authors, set trust_remote_code=True (--trust-remote-code)"
        ) from error


def _check_options(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if name not in _HARMLESS:
            raise _CouldRunCode(f"model_from_pretrained_kwargs: {name!r} is not taken from a file")
        if not _HARMLESS[name](value):
            raise _CouldRunCode(
                f"model_from_pretrained_kwargs: {name}={value!r} is not a value that is taken from "
                "a file"
            )


def _check_model(model_name: str, model_class_name: str, revision: str | None) -> None:
    folder = local_folder(model_name, model_class_name)
    if model_class_name == "HookedTransformer" and folder is None:
        _check_official_name(model_name)
        return
    if folder is not None:
        _check_files(model_name, folder)
    config = _raw_config(str(folder or model_name), revision)
    _check_code(model_name, folder, config)
    if "transformers_weights" in (key for key, _ in _entries(config)):
        raise _CouldRunCode(f"model_name={model_name!r}: its config.json has transformers_weights")
    architectures = config.get("architectures") or []
    text_only = all(str(each).endswith(("ForCausalLM", "LMHeadModel")) for each in architectures)
    if model_class_name == "TransformerBridge" and not text_only:
        raise _CouldRunCode(f"model_name={model_name!r}: {architectures} is no plain text decoder")


def _check_code(model_name: str, folder: Path | None, config: Mapping[str, Any]) -> None:
    if folder is not None and (folder / "custom_generate").exists():  # transformers 4 runs it
        raise _CouldRunCode(f"model_name={model_name!r}: custom_generate/ holds code")
    for key, value in _entries(config):
        is_choice = key.endswith(("attn_implementation", "experts_implementation"))
        if is_choice and value not in (None, *_ATTENTION, *_EXPERTS):
            raise _CouldRunCode(
                f"model_name={model_name!r}: its config.json asks for {key}={value!r}"
            )


def _check_official_name(model_name: str) -> None:
    aliases = loading_from_pretrained.make_model_alias_map()
    official = aliases.get(model_name.lower(), model_name)
    if official.startswith(tuple(loading_from_pretrained.NEED_REMOTE_CODE_MODELS)):
        raise _CouldRunCode(
            f"model_name={model_name!r}: TransformerLens runs code of this model's repository"
        )


def _check_files(model_name: str, folder: Path) -> None:
    for name in _weight_files(folder):
        if not str(name).endswith(".safetensors") or not (folder / str(name)).is_file():
            raise _CouldRunCode(
                f"model_name={model_name!r}: no {_WEIGHTS} in this folder, and weights in other "
                "formats are not read"
            )
    if (folder / "adapter_config.json").exists():
        raise _CouldRunCode(f"model_name={model_name!r}: adapter_config.json names another model")


def _weight_files(folder: Path) -> set[Any]:
    if (folder / _WEIGHTS).is_file() or not (folder / _INDEX).is_file():
        return {_WEIGHTS}
    try:
        return set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{folder / _INDEX}: no index of weights") from error


def _raw_config(name: str, revision: str | None) -> dict[str, Any]:
    """`config.json` as it is written; no class is made of it."""
    return PretrainedConfig.get_config_dict(name, revision=revision)[0]


def _entries(config: Any) -> Iterator[tuple[str, Any]]:
    """All keys and values at any depth."""
    pairs = config.items() if isinstance(config, dict) else ()
    for key, value in pairs:
        yield str(key), json.dumps(value) if isinstance(value, dict | list) else value
        yield from _entries(value)
