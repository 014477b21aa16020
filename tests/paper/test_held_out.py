"""Validation and test text: nothing lost, nothing shared, all of the text sampled."""

import pytest
from datasets import Dataset

from sae_lens_route.errors import UserError
from sae_lens_route.paper.held_out import split_held_out


def lines(n):
    return [f"line {i:06d} of a text that has many\n" for i in range(n)]


@pytest.mark.parametrize("rows", [1, 7, 5_000])
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
    assert abs(len(validation) - len(test)) < 250  # two pieces
    sizes = sorted(len(piece) for half in halves for piece in half["text"])
    assert sizes[1] >= 4_000 and sizes[-1] < 4_100  # one piece is the rest


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
    with pytest.raises(UserError, match="without 'text'"):
        split_held_out(Dataset.from_dict({"tokens": [[1, 2]]}))
