"""Where sentences end, how windows are cut, and how they read."""

import re

import pytest
import torch
from support.contexts import BOS, EOS, make_tokenizer
from support.feature_tables import BLOCKS, HOOKS
from tokenizers import decoders

from sae_lens_route.features.contexts import ContextCollector
from sae_lens_route.features.table import ContextOptions


def sentence_texts(raw, tokenizer=None, **options):
    """The context of every token, for one sequence."""
    tokenizer = tokenizer or make_tokenizer(list(dict.fromkeys(raw)))
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(raw)])
    options = ContextOptions(threshold=0.0, min_contexts=1, max_per_class=99, **options)
    collector = ContextCollector(4, 1, BLOCKS[:1], HOOKS[:1], tokenizer, options)
    kept = torch.ones(ids.shape, dtype=torch.bool)
    collector.add(ids, torch.ones(1, len(raw), 1), ids * 0, torch.ones(ids.shape), kept)
    rows = sorted(collector.table().contexts.to_pylist(), key=lambda row: row["position"])
    return [re.sub("</?ACTIVATED>", "", row["text"]).strip() for row in rows]


def sentences(raw, **options):
    return list(dict.fromkeys(sentence_texts(raw, **options)))


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (["He", "Ġwent", ".", "ĠShe", "Ġstayed", "."], ["He went.", "She stayed."]),
        (['"', "Go", '."', "ĠThen"], ['"Go."', "Then"]),
        (["Go", ".", '"', ")", "ĠThen"], ['Go.")', "Then"]),
        (["Go", ".", "Ċ", '"', "No", '"'], ["Go.", '"No"']),
        (["Go", ".Ċ", '"', "No", '"'], ["Go.", '"No"']),
        (["Go", ".", 'Ġ"', "No", '"'], ["Go.", '"No"']),
        (["3", ".", "14", "Ġis", "Ġpi", "!?", "ĠYes"], ["3.14 is pi!?", "Yes"]),
        (["Head", "ĊĊ", "Body"], ["Head", "Body"]),
        (["a", "Ċ", "b"], ["a\nb"]),
        (["one", EOS, BOS, "two"], ["one", EOS, BOS, "two"]),
    ],
)
def test_sentence_ends_in_decoded_text(raw, expected):
    assert sentences(raw) == expected


def test_the_reference_ends_sentences_at_raw_tokens_only():
    raw = ["Go", '."', "ĠThen", "Ġ3", ".", "14"]
    assert sentences(raw, sentences="raw_tokens") == ['Go." Then 3.', "14"]
    assert sentences(raw) == ['Go."', "Then 3.14"]


@pytest.mark.parametrize(("kind", "longest"), [("decoded", 6), ("raw_tokens", 7)])
def test_long_sentences_are_cut_around_the_token(kind, longest):
    raw = [f"Ġ{letter}" for letter in "abcdefghijklmnop"]
    texts = sentence_texts(raw, max_length=6, sentences=kind)
    lengths = [len(text.split()) for text in texts]
    assert max(lengths) == longest
    assert texts[8].split()[:4] == ["f", "g", "h", "i"]


def test_sentencepiece_tokens():
    decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    raw = ["▁He", "▁went", ".", "▁S", "he", "<0x21>", "<0x0A>", "▁Yes"]
    tokenizer = make_tokenizer(raw, decoder)
    assert list(dict.fromkeys(sentence_texts(raw, tokenizer))) == ["He went.", "She!", "Yes"]


def test_characters_cut_into_several_tokens_are_joined():
    raw = ["ĠcafÃ", "©", "Ġbar"]
    assert sentence_texts(raw)[2] == "café bar"
