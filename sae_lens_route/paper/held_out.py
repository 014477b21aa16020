"""Held-out text in two halves: choices are made on one, and every table is made on the other."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import NamedTuple

from datasets import Dataset
from torch import Tensor

from sae_lens_route.data.reading import Text
from sae_lens_route.data.rows import checked_rows, text_problem
from sae_lens_route.data.text import load_text_dataset
from sae_lens_route.errors import UserError

_CHARACTERS = 4_000
"""Of a piece of a longer document: a few contexts."""
_MOST_PIECES = 20_000
"""More than any evaluation reads; what follows of a larger text is not looked at."""


class HeldOut(NamedTuple):
    """Two halves of a held-out text; one document at most is in both, in different parts."""

    validation: Dataset
    """For whatever is chosen by looking at held-out text."""
    test: Dataset
    """For the tables."""


def split_held_out(text: Text, seed: int = 0) -> HeldOut:
    """Divide a text into validation and test, the pieces of each in random order.

    Evaluation reads the first tokens of a text. In random order these are a sample of all
    documents, not the beginning of the first ones. The first half of the text is for validation.

    Args:
        text: A dataset with a `text` column, or a path for `load_text_dataset`.
        seed: Of the order.

    Raises:
        UserError: the text is not one of strings, or too short to be divided.
    """
    if isinstance(text, Tensor):
        raise UserError("held-out text: token ids have no documents; give a dataset of text")
    dataset = load_text_dataset(text) if isinstance(text, str) else text
    if "text" not in (columns := next(iter(dataset), {})):
        raise UserError(f"held-out text: its columns are {list(columns)}, without 'text'")
    documents = checked_rows(dataset, "text", text_problem)
    pieces = list(
        itertools.islice(itertools.chain.from_iterable(map(_pieces, documents)), _MOST_PIECES)
    )
    if len(pieces) < 2:
        raise UserError(
            f"held-out text: {sum(map(len, pieces)):,} characters are too few to be divided into "
            f"validation and test; give more than {_CHARACTERS:,}"
        )
    half = len(pieces) // 2
    generator = random.Random(seed)
    halves = (pieces[:half], pieces[half:])
    return HeldOut(
        *(Dataset.from_dict({"text": generator.sample(part, len(part))}) for part in halves)
    )


def _pieces(document: str) -> Iterator[str]:
    """A document in pieces of about `_CHARACTERS`, divided at lines; nothing is lost."""
    piece, size = [], 0
    for line in document.splitlines(keepends=True):
        piece.append(line)
        size += len(line)
        if size >= _CHARACTERS:
            yield "".join(piece)
            piece, size = [], 0
    if piece:
        yield "".join(piece)
