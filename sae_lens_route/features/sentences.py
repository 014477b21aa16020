"""Sentence ends, and windows of tokens as text.

`DecodedSentences` finds sentences in the decoded text; `ReferenceSentences` follows the paper's
code, which looks at raw tokens. Both work on whole batches of token ids.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

REFERENCE_SENTENCE_ENDS = (".", "!", "?", '"', "<|end_of_text|>")
REFERENCE_BLANKS = ("<|end_of_text|>", " ", "")

OPEN, CLOSE = "<ACTIVATED>", "</ACTIVATED>"

# sentence ends in the decoded piece of one token: a mark and any closing quotes or brackets, or a
# blank line; the marks of Chinese and Japanese need no white space after them
_TERMINAL = re.compile(r"""(?:[.!?…。！？][.!?…"'”’»)\]」』）]*\s*|\n\s*\n\s*)$""")  # noqa: RUF001
_WIDE_TERMINAL = re.compile(r"[。！？][”’」』）]*$")  # noqa: RUF001
_CLOSERS = re.compile(r"""["'”’»)\]」』）]+\s*""")  # noqa: RUF001


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer's tokens as arrays over token ids."""

    raw: list[str]
    """As the tokenizer stores them."""
    pieces: list[str]
    """As they read within a text."""
    special: Bool[np.ndarray, " vocab"]
    classes: list[str]
    """The distinct raw tokens, stripped and lower-cased, sorted."""
    class_of: Int[np.ndarray, " vocab"]

    @classmethod
    def of(cls, tokenizer: Any) -> Vocabulary:
        """The vocabulary of a Hugging Face tokenizer."""
        n_ids = max(tokenizer.get_vocab().values()) + 1
        # ids may have gaps, for which the tokenizer returns None
        raw = [token or "" for token in tokenizer.convert_ids_to_tokens(range(n_ids))]
        names = [token.strip().lower() for token in raw]
        classes = sorted(set(names))
        index = {name: i for i, name in enumerate(classes)}
        special = np.zeros(len(raw), dtype=bool)
        special[tokenizer.all_special_ids] = True
        return cls(
            raw=raw,
            pieces=[piece_of(tokenizer, token) for token in raw],
            special=special,
            classes=classes,
            class_of=np.array([index[name] for name in names], dtype=np.int64),
        )

    def flags(self, condition: Callable[[str], object]) -> Bool[np.ndarray, " vocab"]:
        """True for the token ids whose piece fulfills a condition."""
        return np.array([bool(condition(piece)) for piece in self.pieces])


def piece_of(tokenizer: Any, raw: str) -> str:
    """A raw token as it reads within a text; SentencePiece drops the space at a text's start."""
    text = tokenizer.convert_tokens_to_string([raw])
    return f" {text}" if raw.startswith("▁") and not text.startswith(" ") else text


class Windows(NamedTuple):
    """Window of each token of a batch, flattened: `[batch * pos]`."""

    start: Int[np.ndarray, " tokens"]
    """Flat index of its first token."""
    length: Int[np.ndarray, " tokens"]
    before: Int[np.ndarray, " tokens"]
    """Tokens of the window before this one."""


class DecodedSentences:
    """Sentences of the decoded text."""

    ties_by_text = False
    """Whether equal activations are ordered by text, not by the stream."""

    def __init__(self, tokenizer: Any, vocabulary: Vocabulary, max_length: int) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self.max_length = max_length
        self.left, self.right = self.sides(max_length)
        self.width = self.left + 1 + self.right
        self.prepare()

    @staticmethod
    def sides(max_length: int) -> tuple[int, int]:
        """Tokens kept before and after the activated one if a sentence is too long."""
        return max_length // 2, max_length - 1 - max_length // 2

    def prepare(self) -> None:
        flags = self._vocabulary.flags
        self._special = self._vocabulary.special
        self._terminal = flags(_TERMINAL.search)
        self._closers = flags(_CLOSERS.fullmatch)
        self._wide = flags(_WIDE_TERMINAL.search)
        self._starts_in_space = flags(lambda piece: piece[:1].isspace())
        self._ends_in_space = flags(lambda piece: piece[-1:].isspace())

    def ends(self, ids: Int[np.ndarray, "batch pos"]) -> Bool[np.ndarray, "batch pos"]:
        """True at the last token of a sentence.

        A sentence ends at a token that ends in a mark, or that closes quotes and brackets after
        one, if white space follows. A special token is always a separate sentence.
        """
        n_pos = ids.shape[1]
        special, ends_in_space = self._special[ids], self._ends_in_space[ids]
        closers = self._closers[ids]
        closers[:, 1:] &= ~ends_in_space[:, :-1]  # after white space, a quote is an opening one
        # a run of closers belongs to the last token that is not a closer
        anchor = np.maximum.accumulate(np.where(closers, 0, np.arange(n_pos)), axis=1)
        terminal = np.take_along_axis(self._terminal[ids], anchor, axis=1)
        wide = np.take_along_axis(self._wide[ids], anchor, axis=1)
        # by white space that ends this token or starts the next one, or by the sequence's end; a
        # wide mark needs none, unless another closer follows
        followed = ends_in_space | wide
        followed[:, :-1] &= ends_in_space[:, :-1] | ~closers[:, 1:]
        followed[:, :-1] |= self._starts_in_space[ids[:, 1:]]
        followed[:, -1] = True
        ends = terminal & followed | special
        ends[:, :-1] |= special[:, 1:]
        return ends

    def windows(self, ids: Int[np.ndarray, "batch pos"]) -> Windows:
        """Each token's sentence, cut to `left` and `right` tokens around it if too long."""
        ends = self.ends(ids)
        n_batch, n_pos = ids.shape
        at = np.broadcast_to(np.arange(n_pos), ids.shape)
        after_end = np.zeros(ids.shape, dtype=np.int64)
        after_end[:, 1:] = np.where(ends, at + 1, 0)[:, :-1]
        # the latest start at or before each token, and the earliest end at or after it
        first = np.maximum.accumulate(after_end, axis=1)
        next_end = np.where(ends, at, n_pos - 1)
        last = np.minimum.accumulate(next_end[:, ::-1], axis=1)[:, ::-1]
        long = last - first + 1 > self.max_length
        first = np.where(long, np.maximum(first, at - self.left), first)
        last = np.where(long, np.minimum(last, at + self.right), last)
        row = np.arange(n_batch)[:, None] * n_pos
        return Windows((row + first).ravel(), (last - first + 1).ravel(), (at - first).ravel())

    def text(self, ids: list[int], before: int) -> str:
        """A window as text, with markers around the token at index `before`."""
        return self.marked(ids, before).strip()

    def marked(self, ids: list[int], before: int) -> str:
        """`text` without stripping."""
        piece = self._vocabulary.pieces.__getitem__
        left, right = "".join(map(piece, ids[:before])), "".join(map(piece, ids[before + 1 :]))
        text = f"{left}{OPEN}{piece(ids[before])}{CLOSE}{right}"  # much faster than the tokenizer
        if "\ufffd" in text:  # only the tokenizer can join a character of several tokens
            raw = [self._vocabulary.raw[i] for i in ids]
            # separate tokens for the markers, because SentencePiece recognizes byte tokens by form
            raw[before : before + 1] = [OPEN, raw[before], CLOSE]
            text = self._tokenizer.convert_tokens_to_string(raw)
        return text


class ReferenceSentences(DecodedSentences):
    """Sentences of the paper's code: raw tokens end them, and their edges are trimmed."""

    ties_by_text = True

    @staticmethod
    def sides(max_length: int) -> tuple[int, int]:
        return max_length // 2, max_length // 2

    def prepare(self) -> None:
        raw = self._vocabulary.raw
        self._end = np.array([token in REFERENCE_SENTENCE_ENDS for token in raw])
        self._blank = [token in REFERENCE_BLANKS for token in raw]

    def ends(self, ids: Int[np.ndarray, "batch pos"]) -> Bool[np.ndarray, "batch pos"]:
        return self._end[ids]

    def text(self, ids: list[int], before: int) -> str:
        first, last = 0, len(ids)
        while first < before and self._blank[ids[first]]:
            first += 1
        while last > before + 1 and self._blank[ids[last - 1]]:
            last -= 1
        return self.marked(ids[first:last], before - first).strip().strip('"')
