"""Validation and test text: nothing lost, nothing shared, all of the text sampled."""

import pytest
import torch
from datasets import Dataset

from sae_lens_route.errors import UserError
from sae_lens_route.paper.held_out import split_held_out


def lines(n):
    return [f"line {i:06d} of a text that has many\n" for i in range(n)]


@pytest.mark.parametrize("rows", [1, 7, 1_000])
def test_both_halves_together_are_the_text(rows):
    text = lines(5_000)
    size = -(-len(text) // rows)
    documents = ["".join(text[i : i + size]) for i in range(0, len(text), size)]
    halves = split_held_out(Dataset.from_dict({"text": documents}))
    validation, test = (
        {line for piece in half["text"] for line in piece.splitlines(keepends=True)}
        for half in halves
    )
    assert not validation & test and validation | test == set(text)
    assert max(validation) < min(test)
    assert 0.8 < len(validation) / len(test) < 1.25
    pieces = [piece for half in halves for piece in half["text"]]
    assert max(map(len, pieces)) < 4_100
    assert all(sum(piece in document for document in documents) == 1 for piece in pieces)


def test_the_first_pieces_are_from_everywhere_and_the_same_each_time():
    dataset = Dataset.from_dict({"text": ["".join(lines(20_000))]})
    test = split_held_out(dataset).test["text"]
    first = [int(piece[5:11]) for piece in test[:20]]
    assert min(first) < 12_500 and max(first) > 17_500 and first != sorted(first)
    assert split_held_out(dataset).test["text"] == test
    assert split_held_out(dataset, seed=1).test["text"] != test


def test_text_that_cannot_be_divided_is_refused():
    with pytest.raises(UserError, match="36 characters are too few"):
        split_held_out(Dataset.from_dict({"text": lines(1)}))
    with pytest.raises(UserError, match=r"\['tokens'\], without 'text'"):
        split_held_out(Dataset.from_dict({"tokens": [[1, 2]]}))
    with pytest.raises(UserError, match="row 1: column 'text' holds None"):
        split_held_out(Dataset.from_dict({"text": ["a", None]}))
    with pytest.raises(UserError, match="token ids have no documents"):
        split_held_out(torch.zeros(2, 8, dtype=torch.int64))
