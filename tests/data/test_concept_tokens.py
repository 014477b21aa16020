"""A word's concepts stand at its last token, whatever the tokenizer does to its characters."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.concepts import byte_level_bpe, demo_tokenizer, document, reading_sae
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sae_lens_route.data.annotations import AnnotatedDocument, Concept, Span
from sae_lens_route.data.concept_tokens import concept_tokens
from sae_lens_route.errors import UserError

DEMO = demo_tokenizer()
TOKENIZERS = {
    "demo": DEMO,
    "offsets without the space": byte_level_bpe(trim_offsets=True),
    "offsets with the space": byte_level_bpe(trim_offsets=False, pad_token="<eos>"),
}
PIECES = [
    "the",
    "cat",
    "do",
    "n't",
    "gon",
    "na",
    "“",
    "”",
    ".",
    '"',
    "São",
    "日本",
    "😀",
    "🎉",
    "Zyx",
]
SPACES = ["", " ", "  ", "\n\n"]
FILLER = AnnotatedDocument("filler", ".", (Span(0, 1, ()),))
"""Makes other concepts rare enough to be measured."""


def labels_of(result):
    """`{(context, position): names of the concepts}` of the annotated tokens."""
    assert not result.labels[~result.annotated].any()
    return {
        (row, pos): {result.concepts[i].name for i in result.labels[row, pos].nonzero()[:, 0]}
        for row, pos in result.annotated.nonzero().tolist()
    }


def labelled(text, sae, tokenizer, n_filler=40):
    """Labels of one document, which is both halves of the split, so that all concepts are kept."""
    documents = [text, *[FILLER] * n_filler, text, *[FILLER] * n_filler]
    halves = [False] * (n_filler + 1) + [True] * (n_filler + 1)
    return concept_tokens(
        documents, sae, tokenizer, is_test=halves, min_positives=1, max_concepts_per_level=10**6
    )


def tokens_of_word(tokenizer, ids, text, span):
    """First and last token of a word, from the decoded text before and after each token."""
    read = [tokenizer.decode(ids[:n], clean_up_tokenization_spaces=False) for n in range(len(ids))]
    read.append(text)
    first = next(k for k in range(len(ids)) if len(read[k + 1]) > span.start)
    last = next(k for k in range(len(ids)) if read[k + 1].startswith(text[: span.end]))
    return first, last


@st.composite
def texts(draw):
    pieces = draw(st.lists(st.sampled_from(PIECES), min_size=1, max_size=25))
    spaces = draw(st.lists(st.sampled_from(SPACES), min_size=len(pieces), max_size=len(pieces)))
    return document([piece for pair in zip(pieces, spaces, strict=True) for piece in pair])


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=40, deadline=None)
@given(text=texts(), context_size=st.integers(3, 40), prepend_bos=st.booleans())
def test_the_decoded_text_up_to_an_annotated_token_ends_with_the_word(
    name, text, context_size, prepend_bos
):
    tokenizer, n_bos = TOKENIZERS[name], int(prepend_bos)
    size = context_size - n_bos
    ids = tokenizer.encode(text.text, add_special_tokens=False)
    expected = {}
    for span in text.spans:
        first, last = tokens_of_word(tokenizer, ids, text.text, span)
        if first // size == last // size:  # otherwise no position has read the whole word
            place = (last // size, n_bos + last % size)
            expected.setdefault(place, set()).add(span.concepts[0].name)
    assume(expected)
    result = labelled(text, reading_sae(context_size, prepend_bos=prepend_bos), tokenizer)
    n_contexts = -(-len(ids) // size)
    assert {at: names for at, names in labels_of(result).items() if at[0] < n_contexts} == expected


def test_contractions_quotes_and_emoji():
    pieces = ["“", "I", " ", "do", "n't", " ", "see", " ", "😀", "😀", ".", "”"]
    text = document([*pieces, " ", "gon", "na", " ", "cannot"])
    expected = {
        "offsets without the space": [
            ("âĢľ", {"“"}), ("I", {"I"}), ("Ġdo", {"do"}), ("'t", {"n't"}), ("Ġsee", {"see"}),
            ("ĠðŁĺĢðŁĺĢ", {"😀"}), (".", {"."}), ("Ŀ", {"”"}), ("Ġgonna", {"gon", "na"}),
            ("t", {"cannot"}),
        ],
        "demo": [
            ("ľ", {"“"}), ("I", {"I"}), ("Ġdon", {"do"}), ("'t", {"n't"}), ("e", {"see"}),
            ("Ģ", {"😀"}), ("Ģ", {"😀"}), (".", {"."}), ("Ŀ", {"”"}), ("on", {"gon"}),
            ("a", {"na"}), ("not", {"cannot"}),
        ],
    }  # fmt: skip
    for name, tokens in expected.items():
        result = labelled(text, reading_sae(64), TOKENIZERS[name])
        found = [
            (TOKENIZERS[name].convert_ids_to_tokens(int(result.tokens[at])), names)
            for at, names in labels_of(result).items()
            if at[0] == 0
        ]
        assert found == [(token, {f"word={word}" for word in words}) for token, words in tokens]


def test_words_that_share_a_span_share_a_token():
    concepts = [Concept("lemma=a", "word"), Concept("lemma=el", "word")]
    text = AnnotatedDocument("es", "va al cine", tuple(Span(3, 5, (c,)) for c in concepts))
    labels = labels_of(labelled(text, reading_sae(), DEMO))
    assert [names for at, names in labels.items() if at[0] == 0] == [{"lemma=a", "lemma=el"}]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_white_space_at_the_edges_of_a_span_does_not_matter(name):
    text = document(["do", "  ", "cat", "\n\n", "see", "  ", "gonna", "\n"])
    wider = [Span(max(0, start - 1), end + 1, concepts) for start, end, concepts in text.spans]
    blank = Span(2, 4, (Concept("blank", "word"),))
    spaced = text._replace(spans=(*wider[:1], blank, *wider[1:]))
    for context_size in range(3, 9):
        sae = reading_sae(context_size)
        expected = labels_of(labelled(text, sae, TOKENIZERS[name]))
        assert labels_of(labelled(spaced, sae, TOKENIZERS[name])) == expected


def test_a_tokenizer_that_marks_the_start_of_words():
    """SentencePiece's way: tokens begin with the space before them, and one is added in front."""
    vocabulary = {"<unk>": 0, "<s>": 1, "▁the": 2, "▁ca": 3, "ts": 4, "▁": 5, ".": 6}
    tokenizer = Tokenizer(
        models.Unigram([(token, -1.0) for token in vocabulary], unk_id=0, byte_fallback=False)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")
    text = document(["the", " ", "cats", ".", " ", "the", " ", "!"])
    result = labelled(text, reading_sae(), fast)
    assert result.tokens[0].tolist()[:7] == [1, 2, 3, 4, 6, 2, 5]
    labels = {pos: names for (row, pos), names in labels_of(result).items() if row == 0}
    words = {1: {"word=the"}, 3: {"word=cats"}, 4: {"word=."}, 5: {"word=the"}}
    assert labels == words, "an unknown token is special: the model has not read the word"


@pytest.mark.parametrize("prepend_bos", [True, False])
def test_a_long_document_continues_in_further_contexts(prepend_bos):
    long = document([piece for i in range(40) for piece in (f"word{i}", " ")], "long")
    short = document(["one", " ", "two"], "short")
    sae = reading_sae(16, prepend_bos=prepend_bos)
    tokenizer = TOKENIZERS["offsets without the space"]
    result = concept_tokens(
        [long, short, long], sae, tokenizer, is_test=[False, True, True], min_positives=1
    )
    for i, text in enumerate([long, short, long]):
        rows = result.tokens[result.documents == i]
        if prepend_bos:
            assert (rows[:, 0] == tokenizer.bos_token_id).all()
            rows = rows[:, 1:]
        ids = tokenizer.encode(text.text, add_special_tokens=False)
        assert rows.flatten().tolist()[: len(ids)] == ids
        padding = rows.flatten()[len(ids) :]
        assert len(padding) < 16 and (padding == tokenizer.eos_token_id).all()
    assert result.tokens.shape[1] == 16
    assert torch.equal(result.is_test, result.documents > 0)


def test_contexts_are_no_longer_than_the_longest_document():
    text = document(["a", " ", "b", " ", "c"])
    result = labelled(text, reading_sae(200), DEMO)
    assert result.tokens.shape[1] == 1 + len(DEMO.encode(text.text, add_special_tokens=False))


def test_special_and_excluded_tokens_do_not_count():
    text = document(["one", "\n", "<|end_of_text|>", "\n", "two", "\n", "one"])
    everything = labelled(text, reading_sae(), DEMO)
    by_token = {
        DEMO.decode(everything.tokens[at]): names
        for at, names in labels_of(everything).items()
        if at[0] == 0
    }
    assert set().union(*by_token.values()) == {"word=one", "word=two"}
    last = max(pos for row, pos in labels_of(everything) if row == 0)
    excluded_id = int(everything.tokens[0, last])
    by_id = labelled(text, reading_sae(exclude_special_tokens=[excluded_id]), DEMO)
    assert not by_id.annotated[by_id.tokens == excluded_id].any()
    by_position = labelled(text, reading_sae(seqpos_slice=(0, last)), DEMO, n_filler=60)
    assert {at for at in labels_of(by_position) if at[0] == 0} == {
        at for at in labels_of(everything) if at[0] == 0 and at[1] < last
    }


def with_concepts(counts, half):
    """Documents of one half: `counts[name]` words with the concept of that name and level."""
    spans = [Span(0, 1, (Concept(*key),)) for key, n in counts.items() for _ in range(n)]
    return [AnnotatedDocument(f"{half}{i}", ".", (span,)) for i, span in enumerate(spans)]


def test_concepts_are_kept_by_frequency_in_both_halves():
    dev = {
        ("a", "x"): 3,
        ("b", "x"): 4,
        ("c", "x"): 9,
        ("d", "y"): 3,
        ("e", "y"): 30,
        ("f", "x"): 3,
    }
    test = {
        ("a", "x"): 3,
        ("b", "x"): 2,
        ("c", "x"): 3,
        ("d", "y"): 9,
        ("e", "y"): 30,
        ("f", "x"): 5,
    }
    documents = [*with_concepts(dev, "dev"), *with_concepts(test, "test")]
    halves = [document.name.startswith("test") for document in documents]

    def names(**options):
        result = concept_tokens(documents, reading_sae(), DEMO, is_test=halves, **options)
        assert [int(result.labels[..., i].sum()) for i in range(len(result.concepts))] == [
            dev[concept] + test[concept] for concept in result.concepts
        ]
        return [concept.name for concept in result.concepts]

    # b has too few in test; e is on more than half of the tokens
    assert names(min_positives=3) == ["c", "f", "a", "d"]
    assert names(min_positives=3, max_concepts_per_level=2) == ["c", "f", "d"]
    assert names(min_positives=2) == ["c", "f", "a", "b", "d"]
    with pytest.raises(UserError, match="none of 6 concepts has min_positives=10 tokens in each"):
        names(min_positives=10)


def test_documents_are_divided_into_equal_halves_whatever_their_order():
    sizes = [400, 190, 180, 80, 70, 50, 30, 10, 5, 5]
    documents = [document(["a", " ", "b", " "] * n, f"{i}") for i, n in enumerate(sizes)]
    results = [
        concept_tokens(order, reading_sae(64), DEMO) for order in (documents, documents[::-1])
    ]
    in_test = [
        {order[i].name for i in result.documents[result.is_test].tolist()}
        for order, result in zip((documents, documents[::-1]), results, strict=True)
    ]
    assert in_test[0] == in_test[1]
    words = [sum(sizes[int(name)] for name in in_test[0]), sum(sizes)]
    assert abs(words[0] / words[1] - 0.5) < 0.01
    counts = results[0].annotated[results[0].is_test].sum() / results[0].annotated.sum()
    assert abs(counts - 0.5) < 0.02


class SlowTokenizer:
    is_fast = False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"is_test": [True]}, "is_test has 1 values for 2 documents"),
        ({"tokenizer": SlowTokenizer()}, "SlowTokenizer does not say where its tokens lie"),
        ({"sae": reading_sae(1)}, "metadata.context_size=1: set the size"),
        ({"sae": reading_sae(None)}, "metadata.context_size=None: set the size"),
        ({"documents": []}, "0 documents without text"),
    ],
)
def test_what_cannot_be_labelled_is_an_error(options, message):
    arguments = {"documents": [FILLER, FILLER], "sae": reading_sae(), "tokenizer": DEMO, **options}
    with pytest.raises(UserError, match=message):
        concept_tokens(**arguments)
