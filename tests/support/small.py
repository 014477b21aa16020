"""Small real things the tests train and evaluate on, in seconds."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from sae_lens_route import RouteTopKTrainingSAEConfig
from sae_lens_route.config import RouteSAERunnerConfig

TINYLLAMA = str(Path(__file__).parents[1] / "golden" / "tinyllama")
TINYLLAMA_WIDTH = 64
TINYLLAMA_SPECIAL = [0, 1]
"""Its BOS and padding."""


def tokens_dataset(n_contexts: int = 64, context_size: int = 16, seed: int = 0) -> Dataset:
    """Pretokenized contexts of the tiny Llama's vocabulary, BOS first, some ending in padding."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, 512, (n_contexts, context_size), generator=generator)
    tokens[:, 0] = 0
    tokens[:, 1] = 2 + torch.arange(n_contexts)  # so that no two tokens have the same activations
    tokens[::4, -3:] = 1
    return Dataset.from_dict({"tokens": tokens.tolist()})


def small_config(output_path: Path | None, **changes: Any) -> RouteSAERunnerConfig:
    """A run of a few steps on the tiny Llama."""
    sae = {"d_in": TINYLLAMA_WIDTH, "d_sae": 128, "k": 8, **changes.pop("sae", {})}
    fields = {
        "model_name": TINYLLAMA,
        "dataset_path": "demo",
        "context_size": 16,
        "store_batch_size_prompts": 4,
        "training_tokens": 16 * 4 * 12,
        "n_checkpoints": 0,
        "output_path": None if output_path is None else str(output_path),
        **changes,
    }
    return RouteSAERunnerConfig(sae=RouteTopKTrainingSAEConfig(**sae), **fields)


def is_kept(token, position, exclude_special_tokens=True, seqpos_slice=(None,)):
    """Whether a token takes part: the rule of `KeptTokens` again, token by token."""
    excluded = exclude_special_tokens or []
    excluded = TINYLLAMA_SPECIAL if excluded is True else excluded
    return token not in excluded and position in range(64)[slice(*seqpos_slice)]
