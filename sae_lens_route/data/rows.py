"""The rows of a dataset, checked one by one, so that an error names the row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from sae_lens_route.errors import UserError


def checked_rows(
    dataset: Iterable[Any], column: str, check: Callable[[Any], str | None]
) -> Iterator[Any]:
    """One column's values in order.

    Args:
        dataset: Rows that map columns to values.
        column: Name of the column.
        check: Says what is wrong with a value, or None.

    Raises:
        UserError: a row that cannot be read or that fails the check; the message has its index,
            counted from 0.
    """
    rows, n = iter(dataset), 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # whatever a reader of JSON, Parquet, or a network raises
            reason = " ".join(str(error).split())
            raise UserError(
                f"the dataset's row {n} cannot be read ({type(error).__name__}: {reason}); repair "
                "or remove it"
            ) from error
        if problem := check(row[column]):
            raise UserError(
                f"the dataset's row {n}: column {column!r} {problem}; repair or remove the row"
            )
        yield row[column]
        n += 1


def text_problem(value: Any) -> str | None:
    """What is wrong with a row of text."""
    return None if isinstance(value, str) else f"holds {_shown(value)}, not text"


def tokens_problem(value: Any, context_size: int, vocabulary: int) -> str | None:
    """What is wrong with a row of token ids for a model with `vocabulary` of them."""
    try:
        ids = np.asarray(value)
    except (TypeError, ValueError):
        return f"holds {_shown(value)}, not token ids"
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        return f"holds {_shown(value)}, not token ids"
    if len(ids) < context_size:
        return f"has {len(ids)} token ids, fewer than context_size={context_size}"
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= vocabulary:
        wrong = lowest if lowest < 0 else highest
        return f"holds the token id {wrong}, but the model has ids 0 to {vocabulary - 1}"
    return None


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 40 else f"{text[:36]} ..."
