"""Held-out text in two halves: choices are made on one, and every table is made on the other."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

from datasets import Dataset

from sae_lens_route.data.reading import Text
from sae_lens_route.data.text import load_text_dataset
from sae_lens_route.errors import UserError

_CHARACTERS = 4_000
"""Of a piece of text: a few contexts. Shorter documents are joined, longer ones divided."""


class HeldOut(NamedTuple):
    """Two halves of a held-out text that share no document."""

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
    if not isinstance(text, str | Dataset):
        raise UserError(f"held-out text: a {type(text).__name__} has no documents; give a dataset")
    dataset = load_text_dataset(text, streaming=False) if isinstance(text, str) else text
    if "text" not in (dataset.column_names or []):
        raise UserError(f"held-out text: its columns are {dataset.column_names}, without 'text'")
    pieces = list(_pieces(row["text"] for row in dataset))  # type: ignore[index]
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


def _pieces(documents: Iterator[str]) -> Iterator[str]:
    """Text of about `_CHARACTERS` each, divided at lines; nothing is lost."""
    piece, size = [], 0
    for document in documents:
        for line in document.splitlines(keepends=True):
            piece.append(line)
            size += len(line)
            if size >= _CHARACTERS:
                yield "".join(piece)
                piece, size = [], 0
    if piece:
        yield "".join(piece)
