"""Gold annotations of text: documents with spans of characters that carry concepts.

`read_conllu` reads treebanks of Universal Dependencies, `labelled_rows` datasets with columns of
labels; `data/python_labels.py` annotates Python source.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from datasets import ClassLabel, Dataset

from sae_lens_route.errors import UserError

_NEW_DOCUMENT = re.compile(r"\s*newdoc\b(?:\s+id\s*=\s*(\S.*))?")
_NEW_PARAGRAPH = re.compile(r"\s*newpar\b")


LEVELS = (
    "word",
    "token",
    "kind",
    "morphology",
    "part of speech",
    "syntax",
    "context",
    "document",
)
"""Levels of concepts in the order of tables and figures, from the word to what surrounds it."""


class Concept(NamedTuple):
    """What an annotation says, such as `("lemma=the", "word")`."""

    name: str
    level: str


class Span(NamedTuple):
    """Characters `[start, end)` of a document's text, a word as a rule, and what is true of it."""

    start: int
    end: int
    concepts: tuple[Concept, ...]


class AnnotatedDocument(NamedTuple):
    """A text and its annotated spans, in order of their ends."""

    name: str
    text: str
    spans: tuple[Span, ...]


class _Sentence(NamedTuple):
    comments: list[str]
    words: list[list[str]]
    """The ten columns of each line, ranges of multi-word tokens included."""
    line: int
    """Number of its last line, for messages."""


class _Token(NamedTuple):
    """A surface token: one word, or several under the form of a multi-word token."""

    form: str
    misc: str
    words: list[list[str]]


def read_conllu(path: str | Path) -> tuple[AnnotatedDocument, ...]:
    """Read a treebank in the CoNLL-U format, such as one of Universal Dependencies.

    The text is rebuilt from FORM and `SpaceAfter=No`: a space between sentences, a blank line
    between paragraphs (`# newpar`); other white space is read as a space. A multi-word token that
    is its words' forms in a row ("don't" = "do" + "n't") is divided among them; the words of
    another one ("al" = "a" + "el") share its span. Empty nodes, which have no text, are ignored.
    The levels and concepts of a word:

    - word: `lemma=the`, in lower case
    - morphology: one for each feature, `Number=Sing`
    - part of speech: `upos=NOUN`. Language-specific tags (XPOS) are left out: where they say more
      than UPOS, the features say the same (NNS is `upos=NOUN` with `Number=Plur`).
    - syntax: the relation to the head with its subtype, `deprel=nsubj:pass`
    - document: `genre=weblog` for every word of a document `weblog-...`, as in the treebank EWT

    Args:
        path: A file in UTF-8; a document without an id gets the file's name and a number.

    Raises:
        UserError: the file cannot be read or is not in the format; the message names the line.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); name a CoNLL-U file in UTF-8") from None
    documents: list[_DocumentBuilder] = []
    for sentence in _sentences(path, lines):
        new_document = _search(_NEW_DOCUMENT, sentence.comments)
        if new_document or not documents:
            name = new_document and new_document[1]
            documents.append(_DocumentBuilder(name or f"{path.stem}.{len(documents) + 1}"))
        new_paragraph = _search(_NEW_PARAGRAPH, sentence.comments)
        documents[-1].add(_surface_tokens(path, sentence), bool(new_paragraph))
    if not documents:
        raise UserError(f"{path}: holds no sentence; name a CoNLL-U file")
    return tuple(builder.document() for builder in documents)


class _DocumentBuilder:
    """A document that grows by sentences."""

    def __init__(self, name: str) -> None:
        self._name = name
        genre, hyphen, _ = name.partition("-")
        self._shared = (Concept(f"genre={genre}", "document"),) if hyphen else ()
        self._pieces: list[str] = []
        self._spans: list[Span] = []
        self._length = 0
        self._separator = ""

    def add(self, tokens: Iterable[_Token], new_paragraph: bool) -> None:
        if new_paragraph and self._pieces:
            self._separator = "\n\n"
        for token in tokens:
            start = self._length + len(self._separator)
            self._pieces += [self._separator, token.form]
            self._length = start + len(token.form)
            for word, (first, end) in zip(token.words, _parts(token), strict=True):
                concepts = (*_word_concepts(word), *self._shared)
                self._spans.append(Span(start + first, start + end, concepts))
            self._separator = "" if "SpaceAfter=No" in token.misc.split("|") else " "

    def document(self) -> AnnotatedDocument:
        return AnnotatedDocument(self._name, "".join(self._pieces), tuple(self._spans))


def _sentences(path: Path, lines: Iterable[str]) -> Iterator[_Sentence]:
    comments: list[str] = []
    words: list[list[str]] = []
    number = 0
    for number, line in enumerate(lines, 1):
        line = line.rstrip("\r")
        if line.startswith("#") and not words:
            comments.append(line[1:])
        elif line.strip():
            words.append(line.split("\t"))
            if len(words[-1]) != 10:
                raise UserError(
                    f"{path}, line {number}: {len(words[-1])} columns instead of the ten of "
                    "CoNLL-U, separated by tabs"
                )
        elif words:
            yield _Sentence(comments, words, number - 1)
            comments, words = [], []
    if words:
        yield _Sentence(comments, words, number)


def _search(pattern: re.Pattern[str], comments: Iterable[str]) -> re.Match[str] | None:
    return next(filter(None, map(pattern.match, comments)), None)


def _surface_tokens(path: Path, sentence: _Sentence) -> Iterator[_Token]:
    words = {row[0]: row for row in sentence.words if "." not in row[0]}
    if len(words) < sum("." not in row[0] for row in sentence.words):
        raise UserError(
            f"{path}, sentence up to line {sentence.line}: two words have the same id; "
            "separate sentences by blank lines"
        )
    inside: set[str] = set()
    for number, row in words.items():
        if number in inside:
            continue
        first, _, last = number.partition("-")
        try:
            parts = [str(i) for i in range(int(first), int(last or first) + 1)]
            yield _Token(row[1], row[9], [words[part] for part in parts])
        except (ValueError, KeyError):
            raise UserError(
                f"{path}, sentence up to line {sentence.line}: the token id {number!r} names no "
                "word, or words that are not there"
            ) from None
        inside.update(parts)


def _parts(token: _Token) -> list[tuple[int, int]]:
    """Characters of each word within its surface token."""
    forms = [word[1] for word in token.words]
    if "".join(forms) != token.form:
        return [(0, len(token.form))] * len(forms)
    edges = list(accumulate(map(len, forms), initial=0))
    return list(pairwise(edges))


def _word_concepts(columns: Sequence[str]) -> Iterator[Concept]:
    _, form, lemma, upos, _, features, _, relation, _, _ = columns
    if lemma != "_" or form == "_":
        yield Concept(f"lemma={lemma.lower()}", "word")
    if features != "_":
        yield from (Concept(feature, "morphology") for feature in features.split("|"))
    if upos != "_":
        yield Concept(f"upos={upos}", "part of speech")
    if relation != "_":
        yield Concept(f"deprel={relation}", "syntax")


def labelled_rows(
    dataset: Dataset, labels: Sequence[str], *, column: str = "tokens"
) -> tuple[AnnotatedDocument, ...]:
    """Documents of a dataset that has columns of labels; a concept's level is its column.

    Args:
        dataset: One document a row.
        labels: Columns with one label per word, or one per row, which then stands at every word.
            `None` is no label; a word without any is not annotated.
        column: Column of the words, as lists, or of texts, whose words white space separates.

    Raises:
        UserError: a column is missing, or a row has not as many labels as words.
    """
    if missing := [name for name in (column, *labels) if name not in dataset.column_names]:
        raise UserError(f"no column {missing[0]!r}: the dataset has {dataset.column_names}")
    classes = {name: _class_names(dataset.features[name]) for name in labels}
    documents: list[AnnotatedDocument] = []
    for i, row in enumerate(dataset):
        assert isinstance(row, dict)
        text, edges = _words(row[column], i, column)
        concepts: list[list[Concept]] = [[] for _ in edges]
        for name in labels:
            values = row[name] if isinstance(row[name], list) else [row[name]] * len(edges)
            if len(values) != len(edges):
                raise UserError(
                    f"the dataset's row {i}: {len(values)} labels in {name!r}, {len(edges)} words "
                    f"in {column!r}; repair or remove the row"
                )
            for word, value in zip(concepts, values, strict=True):
                if value is not None:
                    label = classes[name][value] if classes[name] else value
                    word.append(Concept(f"{name}={label}", name))
        words = zip(edges, concepts, strict=True)
        spans = [Span(*edge, tuple(carried)) for edge, carried in words if carried]
        documents.append(AnnotatedDocument(str(i), text, tuple(spans)))
    return tuple(documents)


def _words(value: Any, row: int, column: str) -> tuple[str, list[tuple[int, int]]]:
    """The text of a row and the edges of its words."""
    if isinstance(value, str):
        return value, [match.span() for match in re.finditer(r"\S+", value)]
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise UserError(
            f"the dataset's row {row}: column {column!r} holds neither text nor a list of words; "
            "repair or remove the row"
        )
    starts = accumulate((len(word) + 1 for word in value), initial=0)
    edges = [(start, start + len(word)) for start, word in zip(starts, value, strict=False)]
    return " ".join(value), edges


def _class_names(feature: Any) -> list[str]:
    """Names of the classes that a column's integers stand for; empty if its values are labels."""
    feature = getattr(feature, "feature", feature)  # of the elements of a list
    return feature.names if isinstance(feature, ClassLabel) else []
