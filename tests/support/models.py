"""Small language models in folders, loaded every way, and their residual streams."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from sae_lens.analysis.compat import has_transformer_bridge
from torch import Tensor
from transformers import AutoModelForCausalLM

from sae_lens_route.models.kinds import n_layers, residual_hook_names, residual_of
from sae_lens_route.models.load import MODEL_CLASS_NAMES
from support.small import TINYLLAMA

needs_bridge = pytest.mark.skipif(
    not has_transformer_bridge(), reason="TransformerBridge came with TransformerLens 3"
)
MODEL_CLASSES = [
    pytest.param(name, marks=needs_bridge if name == "TransformerBridge" else ())
    for name in MODEL_CLASS_NAMES
]

SMALL = {
    "vocab_size": 512,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # short, so that 200 tokens show the scaling
}


def residual_streams(model: Any, tokens: Tensor) -> Tensor:
    """`[block, batch, pos, d]`, read through the model's hooks."""
    names = residual_hook_names(model, range(n_layers(model)))
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=names)
    return torch.stack([cache[name] for name in names])


def hugging_face_streams(folder: Path, tokens: Tensor, blocks: str) -> Tensor:
    """The same from the Hugging Face model itself; `blocks` is the path of its list of blocks."""
    hf_model = AutoModelForCausalLM.from_pretrained(
        str(folder), attn_implementation="eager"
    ).float()
    streams: list[Tensor] = []
    for block in hf_model.get_submodule(blocks).children():
        block.register_forward_hook(lambda _m, _i, output: streams.append(residual_of(output)))
    with torch.no_grad():
        hf_model(tokens)
    return torch.stack(streams)


def assert_same_streams(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    """Equal in every block, up to `tolerance` of that block's standard deviation."""
    assert ours.shape == theirs.shape
    error = (ours - theirs).abs().amax((1, 2, 3)) / theirs.std((1, 2, 3))
    assert error.max() <= tolerance, error


def random_tokens(n: int, n_tokens: int = 512) -> Tensor:
    return torch.randint(n_tokens, (2, n), generator=torch.Generator().manual_seed(1))


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def small_folder(folder: Path, family: str, **changes: Any) -> Path:
    """A small random model, its norms and biases away from their defaults."""
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **changes})
    torch.manual_seed(0)
    hf_model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in hf_model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    hf_model.save_pretrained(folder)
    for file in Path(TINYLLAMA).glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder
