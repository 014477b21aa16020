"""Tokenizers made on the fly, and an SAE that says how annotated text is cut into contexts."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import sae_lens_route
from sae_lens_route import RouteTopKTrainingSAEConfig
from sae_lens_route.data.annotations import AnnotatedDocument, Concept, Span
from sae_lens_route.saes import RouteTopKTrainingSAE

DEMO = f"{sae_lens_route.__path__[0]}/demo"
TRAINING_TEXT = [
    "The cat doesn't know that they're gonna fly to São Paulo today.",
    "“Don't!” said the dog; \"you'll see 😀😀 and 🎉 there...\"",
    "def f(self, x): return self.name[x]  # naïve 日本語",
]


def byte_level_bpe(*, trim_offsets, pad_token=None):
    """A byte-level BPE tokenizer, some of whose tokens divide a character or join several words.

    Args:
        trim_offsets: Whether the offsets of a token leave out its leading space.
        pad_token: None for a tokenizer without.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + 120,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token=pad_token
    )


def demo_tokenizer():
    return AutoTokenizer.from_pretrained(DEMO)


def reading_sae(context_size=32, *, prepend_bos=True, **metadata):
    """An SAE that was trained on contexts of this size."""
    sae = RouteTopKTrainingSAE(RouteTopKTrainingSAEConfig(d_in=4, d_sae=8, k=2, n_routed_layers=2))
    metadata |= {"context_size": context_size, "prepend_bos": prepend_bos}
    for name, value in metadata.items():
        sae.cfg.metadata[name] = value
    return sae


def document(pieces, name="document", level="word"):
    """A document of words and the white space (or nothing) between them: `["a", " ", "b"]`.

    Each word carries the concept `word=` that word.
    """
    spans, length = [], 0
    for piece in pieces:
        if piece.strip():
            concept = Concept(f"word={piece}", level)
            spans.append(Span(length, length + len(piece), (concept,)))
        length += len(piece)
    return AnnotatedDocument(name, "".join(pieces), tuple(spans))
