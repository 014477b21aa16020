"""Folders from an attacker: each payload, if it ran, would leave a file behind."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sae_lens_route.models.kinds import residual_hook_names
from sae_lens_route.saes import RouteTopKSAE, RouteTopKSAEConfig
from sae_lens_route.saes.metadata import routed_hook_name
from support.small import TINYLLAMA, TINYLLAMA_WIDTH

BLOCKS = [3, 5, 6]


class Bomb:
    """An object whose unpickling writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return exec, (f"open({str(self.marker)!r}, 'w').write('ran')",)


def bomb(marker: Path) -> bytes:
    """A pickle that writes `marker`, in a form that every reader of pickles takes."""
    return pickle.dumps({"model.embed_tokens.weight": Bomb(marker)})


def code(marker: Path) -> str:
    """A Python module that writes `marker` and then defines what a loader would look for."""
    return f"""
open({str(marker)!r}, "w").write("ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


class Config(LlamaConfig):
    pass


class Model(LlamaForCausalLM):
    config_class = Config


class Tokenizer(PreTrainedTokenizerFast):
    pass


def generate(model, *arguments, **options):
    raise SystemExit


def main():
    raise SystemExit
"""


def _edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _remote_classes(folder: Path, marker: Path, **changes: Any) -> None:
    (folder / "payload.py").write_text(code(marker))
    classes = {"AutoConfig": "payload.Config", "AutoModelForCausalLM": "payload.Model"}
    _edit(folder / "config.json", auto_map=classes, **changes)


def unknown_type(folder: Path, marker: Path) -> None:
    """A configuration that only the folder's own code can read."""
    _remote_classes(folder, marker, model_type="payload")


def known_type(folder: Path, marker: Path) -> None:
    """Code of the folder that claims a type which the library has classes for."""
    _remote_classes(folder, marker)


def remote_tokenizer(folder: Path, marker: Path) -> None:
    """A tokenizer class in the folder."""
    (folder / "payload.py").write_text(code(marker))
    entry = {"AutoTokenizer": [None, "payload.Tokenizer"]}
    _edit(folder / "tokenizer_config.json", auto_map=entry, tokenizer_class="Tokenizer")


def pickled_weights(folder: Path, marker: Path) -> None:
    """Weights as a pickle, and no others."""
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(bomb(marker))


def zipped_pickle(folder: Path, marker: Path) -> None:
    """Weights as `torch.save` writes them."""
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Bomb(marker)}, folder / "pytorch_model.bin")


def pickled_shards(folder: Path, marker: Path) -> None:
    """A safetensors index that names pickles."""
    (folder / "model.safetensors").unlink()
    (folder / "shard.bin").write_bytes(bomb(marker))
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "shard.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def named_weights(folder: Path, marker: Path) -> None:
    """A configuration that names a pickle as the file of weights."""
    (folder / "adapter_model.bin").write_bytes(bomb(marker))
    _edit(folder / "config.json", transformers_weights="adapter_model.bin")


def disguised_pickle(folder: Path, marker: Path) -> None:
    """A pickle by the name of a safetensors file."""
    (folder / "model.safetensors").write_bytes(bomb(marker))


def extra_pickles(folder: Path, marker: Path) -> None:
    """Pickles next to good files, by the names that libraries look for."""
    for name in ("pytorch_model.bin", "training_args.bin", "vocab.pkl", "optimizer.pt"):
        (folder / name).write_bytes(bomb(marker))


def custom_generate(folder: Path, marker: Path) -> None:
    """A generation loop in the folder."""
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code(marker))
    _edit(folder / "config.json", custom_generate=str(folder))
    if (folder / "generation_config.json").exists():
        _edit(folder / "generation_config.json", custom_generate=str(folder))


def attention_kernel(folder: Path, marker: Path) -> None:
    """Attention from a repository of compiled code."""
    _edit(folder / "config.json", attn_implementation="attacker/kernel")


def nested_kernel(folder: Path, marker: Path) -> None:
    """The same for a part of the model."""
    _edit(folder / "config.json", text_config={"_attn_implementation": "attacker/kernel"})


def adapter(folder: Path, marker: Path) -> None:
    """An adapter whose base model is elsewhere, its weights a pickle."""
    content = {"base_model_name_or_path": "attacker/model", "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    (folder / "adapter_model.bin").write_bytes(bomb(marker))


def chat_template(folder: Path, marker: Path) -> None:
    """A template that reaches for Python's builtins."""
    escape = "{{ cycler.__init__.__globals__.__builtins__.open('%s', 'w').write('ran') }}"
    lipsum = "{{ lipsum.__globals__['os'].system('touch %s') }}"
    template = "{{ messages[0]['content'] }}" + (escape % marker) + (lipsum % marker)
    _edit(folder / "tokenizer_config.json", chat_template=template)
    (folder / "chat_template.jinja").write_text(template)


def importable(folder: Path, marker: Path) -> None:
    """Modules by names that a library might import from the working directory."""
    for name in ("__init__.py", "sitecustomize.py", "conftest.py", "kernels.py", "peft.py"):
        (folder / name).write_text(code(marker))


MODEL_PAYLOADS: dict[str, Callable[[Path, Path], None]] = {
    each.__name__: each
    for each in (
        *(unknown_type, known_type, remote_tokenizer, pickled_weights, zipped_pickle),
        *(pickled_shards, named_weights, disguised_pickle, extra_pickles, custom_generate),
        *(attention_kernel, nested_kernel, adapter, chat_template, importable),
    )
}
"""What a model folder can hold, by name."""

HOSTILE_OPTIONS: dict[str, dict[str, Any]] = {
    "trust": {"trust_remote_code": True},
    "trust and pickles": {"trust_remote_code": True, "use_safetensors": False},
    "pickles": {"weights_only": False, "use_safetensors": False},
    "code revision": {"code_revision": "main", "trust_remote_code": "yes"},
    "kernels": {"attn_implementation": "attacker/kernel", "allow_all_kernels": True},
    "kernel": {"attn_implementation": "attacker/kernel"},
    "use kernels": {"use_kernels": True},
    "another repository": {"hf_model": "attacker/model"},
    "tokenizer": {"tokenizer": "attacker/tokenizer"},
    "files": {"gguf_file": "model.gguf", "subfolder": "..", "state_dict": {}},
    "adapter": {"adapter_kwargs": {"path": "attacker/adapter"}},
    "processing": {"fold_ln": True},
    "overrides": {"hf_config_overrides": {"auto_map": {"AutoConfig": "payload.Config"}}},
    "cache": {"cache_dir": "/tmp", "proxies": {"https": "http://attacker"}, "token": "secret"},
    "dtype": {"torch_dtype": "os.system"},
}
"""What `model_from_pretrained_kwargs` of a saved SAE can hold; each must be refused by name."""


def model_folder(folder: Path, payload: str, marker: Path) -> Path:
    """A copy of the tiny Llama with one payload."""
    shutil.copytree(TINYLLAMA, folder)
    MODEL_PAYLOADS[payload](folder, marker)
    return folder


def saved_sae(folder: Path, model: Any, model_name: str, **metadata: Any) -> Path:
    """A good RouteSAE for the tiny Llama, whose metadata names another model."""
    torch.manual_seed(0)
    sizes = {"d_in": TINYLLAMA_WIDTH, "d_sae": 96, "k": 4, "n_routed_layers": len(BLOCKS)}
    sae = RouteTopKSAE(RouteTopKSAEConfig(**sizes))
    fields = {
        "model_name": model_name,
        "model_class_name": "HookedTransformer",
        "model_from_pretrained_kwargs": {},
        "hook_name": routed_hook_name(BLOCKS[-1]),
        "hook_names": residual_hook_names(model, BLOCKS),
        "routed_blocks": BLOCKS,
        "context_size": 16,
        "prepend_bos": True,
        "exclude_special_tokens": True,
        **metadata,
    }
    for name, value in fields.items():
        setattr(sae.cfg.metadata, name, value)
    sae.save_model(folder)
    return folder
