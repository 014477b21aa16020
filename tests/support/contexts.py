"""A small tokenizer and random streams of feature activations, to collect contexts from."""

from unittest.mock import patch

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from sae_lens_route.features import strongest
from sae_lens_route.features.contexts import ContextCollector
from support.feature_tables import BLOCKS, HOOKS

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"


def make_tokenizer(raw, decoder=None):
    """A tokenizer with exactly these tokens, of byte-level BPE unless told otherwise."""
    tokenizer = Tokenizer(WordLevel({token: i for i, token in enumerate(raw)}, unk_token=raw[0]))
    tokenizer.decoder = decoder or decoders.ByteLevel()
    special = {"bos_token": BOS, "eos_token": EOS}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{k: v for k, v in special.items() if v in raw}
    )


RAW = [
    BOS, EOS, ".", "!", '."', '"', ")", "?)", "Ġ\"", "Ġ", "The", "the", "Ġthe", "ĠThe", "3", "a",
    "Ġb", ".Ċ", "Ċ", '"Ċ', ",",
]  # fmt: skip
TOKENIZER = make_tokenizer(RAW)
PIECES = [t.replace("Ġ", " ").replace("Ċ", "\n") for t in RAW]


def random_stream(n=60, pos=24, d_sae=12, seed=0):
    """The arguments of `ContextCollector.add`, for a stream without excluded tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(len(RAW), (n, pos), generator=generator)
    acts = torch.randn(n, pos, d_sae, generator=generator).relu()
    acts = (acts * 20).round() / 20  # some are equal
    route = torch.randint(3, (n, pos), generator=generator)
    weight = torch.rand(n, pos, generator=generator)
    return tokens, acts, route, weight, torch.ones(n, pos, dtype=torch.bool)


def collect(stream, options, sizes, min_queue=2**17, threshold=None):
    """The table after adding the stream in batches of these sizes, cyclically."""
    d_sae = stream[1].shape[-1]
    with patch.object(strongest, "MIN_QUEUE", min_queue):
        collector = ContextCollector(4, d_sae, BLOCKS, HOOKS, TOKENIZER, options)
        done, turn = 0, 0
        while done < len(stream[0]):
            size = sizes[turn % len(sizes)]
            collector.add(*(part[done : done + size] for part in stream))
            done, turn = done + size, turn + 1
        return collector.table(threshold)
