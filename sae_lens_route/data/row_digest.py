"""Which text has been read: one digest over all rows, compared where a run resumes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_lens_route.errors import UserError

ANOTHER_TEXT = (
    "the rows of the dataset are not those that the interrupted run has read; resume with the same "
    "dataset_path and its rows as they were"
)


class RowDigest:
    """SHA-256 over the rows of a dataset in the order they are read.

    It is known only as far as the text was read, so positions are compared where reading arrives at
    them: resuming skips the text before its position, and so reads it again.
    """

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._expected: tuple[int, bytes] | None = None

    def add(self, row: Any) -> None:
        """Take in the next row: text, token ids, or a conversation."""
        content = _bytes(row)
        self._sha256.update(len(content).to_bytes(8, "little"))
        self._sha256.update(content)

    @property
    def hexdigest(self) -> str:
        """Digest of the rows so far."""
        return self._sha256.hexdigest()

    def state(self, n_contexts: int) -> dict[str, Tensor]:
        """What `expect` takes, where `n_contexts` have been read; empty before the first."""
        n_contexts, digest = self._expected or (n_contexts, self._sha256.digest())
        if n_contexts == 0:  # rows that were read ahead do not belong to a position yet
            return {}
        return {
            "digest_contexts": torch.tensor(n_contexts),
            "digest_sha256": torch.frombuffer(bytearray(digest), dtype=torch.uint8),
        }

    def expect(self, state: Mapping[str, Tensor]) -> None:
        """Compare with an earlier state once as many contexts have been read."""
        if "digest_sha256" in state:
            digest = bytes(state["digest_sha256"].tolist())
            self._expected = int(state["digest_contexts"]), digest

    def check(self, n_contexts: int) -> None:
        """Called whenever contexts have been read.

        Raises:
            UserError: the rows are not those of the expected state.
        """
        if self._expected is None or n_contexts < self._expected[0]:
            return
        (_, digest), self._expected = self._expected, None
        if self._sha256.digest() != digest:
            raise UserError(ANOTHER_TEXT)


def _bytes(row: Any) -> bytes:
    if isinstance(row, str):
        return row.encode("utf-8", "surrogatepass")
    ids = np.asarray(row)
    return ids.astype("<i8").tobytes() if ids.dtype.kind in "iu" else repr(row).encode()
