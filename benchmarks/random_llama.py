"""The language model of the speed benchmarks."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def random_llama(shape: dict[str, int], folder: Path) -> Path:
    """A 16-block Llama with random weights, saved with a small tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape["d"],
        intermediate_size=4 * shape["d"],
        num_hidden_layers=16,
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["heads"],
        vocab_size=shape["vocab"],
        max_position_embeddings=shape["context"],
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {str(i): i for i in range(shape["vocab"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="0", eos_token="1"
    ).save_pretrained(folder)
    return folder
