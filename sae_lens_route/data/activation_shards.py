"""The files of an activation cache: safetensors shards, and a manifest that is replaced after each.

`cache.json` says what the activations depend on, and of every shard its checksum and the rows of
each pass. `shard-00000.safetensors` and so on hold `streams` `[rows, L, d]`, the kept tokens of
whole passes, and for int8 `scales` `[rows, L]`.

A killed writer leaves whole shards, and the next one goes on after them. Reading maps shards into
memory; nothing in them is executed. Checksums (XXH3) find damage and mistakes, not malice.
"""

from __future__ import annotations

import shutil
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import torch
import xxhash
from jaxtyping import Float, Int
from sae_lens.constants import DTYPE_MAP
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from sae_lens_route.errors import UserError, reading_errors
from sae_lens_route.files import (
    LOCK_FILENAME,
    disk_errors,
    lock,
    remove_unfinished,
    write_file,
    write_tensors,
)
from sae_lens_route.records import as_json, typed
from sae_lens_route.saes.saved_config import read_json_object

MANIFEST_FILENAME = "cache.json"
SHARD_BYTES = 2**28
"""A shard holds as many passes as fit, and at least one."""

CacheDtype = Literal["exact", "int8"]
"""Streams as the model computes them, or a byte per number and a scale per token and block."""


class Shard(NamedTuple):
    """What the manifest says of a shard."""

    rows_of_passes: list[int]
    """Kept tokens of each pass in it."""
    xxh3: str
    """Checksum of the file."""


@dataclass(frozen=True)
class Manifest:
    """What a cache holds.

    Args:
        made_with: What the activations depend on, as JSON values.
        text_sha256: Of the contexts of the first pass.
        model_files: Identity of the files that the model was loaded from; None if it is not known.
        blocks: The blocks whose streams are there, ascending.
        hook_names: Their names in the model.
        n_layers: Blocks of the model.
        width: Dimensions of a residual stream.
        dtype: In which the model adds up its streams.
        cache_dtype: How they are stored.
        shards: In the order of the text.
    """

    made_with: dict[str, Any]
    text_sha256: str
    model_files: str | None
    blocks: list[int]
    hook_names: list[str]
    n_layers: int
    width: int
    dtype: str
    cache_dtype: CacheDtype
    shards: list[Shard] = field(default_factory=list)

    @property
    def n_rows(self) -> int:
        """Tokens of the passes that are written."""
        return sum(sum(shard.rows_of_passes) for shard in self.shards)

    @property
    def row_bytes(self) -> int:
        """Bytes that one token takes."""
        numbers = len(self.blocks) * self.width
        if self.cache_dtype == "int8":
            return numbers + 4 * len(self.blocks)
        return numbers * DTYPE_MAP[self.dtype].itemsize


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a cache; None if the folder holds none.

    Raises:
        UserError: it is damaged.
    """
    path = folder / MANIFEST_FILENAME
    if not path.exists():
        return None
    with reading_errors(str(path), TypeError):
        manifest = typed(Manifest, read_json_object(path))
        counts = [n for shard in manifest.shards for n in shard.rows_of_passes]
        numbers = [manifest.n_layers, manifest.width, *manifest.blocks, *counts]
        if any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError("a number is none")
        if manifest.dtype not in DTYPE_MAP or len(manifest.blocks) != len(manifest.hook_names):
            raise ValueError(f"dtype={manifest.dtype!r}, blocks={manifest.blocks}")
    return manifest


class ActivationShards:
    """The passes of a cache in the order of the text; those at the end can be appended to.

    Shards are mapped into memory, and a checksum is compared when its shard is first read.

    Args:
        folder: Where the cache is, or begins.
        manifest: What it holds; grows as shards are written.
        passes_per_shard: Passes that a new shard holds.

    Raises:
        UserError: a shard is missing or does not fit the manifest; the message names it.
    """

    def __init__(self, folder: Path, manifest: Manifest, passes_per_shard: int) -> None:
        self.folder, self.manifest = folder, manifest
        self._passes_per_shard, self._pending = passes_per_shard, list[Tensor]()
        self._open: dict[int, dict[str, Tensor]] = {}
        self._lock: IO[str] | None = None
        self._first_passes = [0]
        for i, shard in enumerate(manifest.shards):
            self._check_shape(i, shard)
            self._first_passes.append(self._first_passes[-1] + len(shard.rows_of_passes))

    @property
    def n_passes(self) -> int:
        """Passes that can be read, those that are not written yet included."""
        return self._first_passes[-1] + len(self._pending)

    def streams(self, n: int, positions: Sequence[int]) -> list[Float[Tensor, "rows d"]]:
        """The streams of pass `n` at some of the blocks, as views where they are stored exactly.

        Raises:
            UserError: the shard's content is not what was written.
        """
        i = bisect_right(self._first_passes, n) - 1
        local = n - self._first_passes[i]
        if i == len(self.manifest.shards):
            stored, rows = self._stored(self._pending[local]), slice(None)
        else:
            rows_of_passes = self.manifest.shards[i].rows_of_passes
            first = sum(rows_of_passes[:local])
            stored, rows = self._mapped(i), slice(first, first + rows_of_passes[local])
        streams = [stored["streams"][rows, position] for position in positions]
        if "scales" not in stored:
            return streams
        scales = [stored["scales"][rows, position].unsqueeze(-1) for position in positions]
        return [stream * scale for stream, scale in zip(streams, scales, strict=True)]

    def add(self, rows: Float[Tensor, "rows L d"]) -> None:
        """Append the kept tokens of the next pass.

        Raises:
            UserError: another run writes to the folder, or has written to it, or the disk is full.
        """
        if self._lock is None:
            self._begin()
        self._pending.append(rows)
        if len(self._pending) == self._passes_per_shard:
            self.flush()

    def flush(self) -> None:
        """Write what was added since the last shard."""
        if not self._pending:
            return
        path = self._path(len(self.manifest.shards))
        rows_of_passes = [len(rows) for rows in self._pending]
        write_tensors(path, self._stored(torch.cat(self._pending)))
        self.manifest.shards.append(Shard(rows_of_passes, file_checksum(path)))
        write_file(self.folder / MANIFEST_FILENAME, as_json(self.manifest))
        self._first_passes.append(self._first_passes[-1] + len(rows_of_passes))
        self._pending.clear()

    def close(self) -> None:
        """Write the rest, and let others write."""
        self.flush()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _begin(self) -> None:
        name = f"cache_activations={str(self.folder)!r}"
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            file = (self.folder / LOCK_FILENAME).open("a+")
        try:
            lock(file, name)
            found = read_manifest(self.folder)
            if found is not None and found != self.manifest:
                raise UserError(f"{name}: another run has written to it since this one began")
        except BaseException:
            file.close()
            raise
        remove_unfinished(self.folder)
        self._lock = file

    def _stored(self, rows: Float[Tensor, "rows L d"]) -> dict[str, Tensor]:
        if self.manifest.cache_dtype == "exact":
            return {"streams": rows}
        return dict(zip(("streams", "scales"), quantized(rows), strict=True))

    def _path(self, i: int) -> Path:
        return self.folder / f"shard-{i:05d}.safetensors"

    def _check_shape(self, i: int, shard: Shard) -> None:
        path, manifest = self._path(i), self.manifest
        shape = [sum(shard.rows_of_passes), len(manifest.blocks), manifest.width]
        with reading_errors(str(path), SafetensorError), safe_open(path, "pt") as file:
            found = file.get_slice("streams").get_shape()
        if found != shape:
            raise UserError(
                f"{path}: holds streams of shape {found}, {MANIFEST_FILENAME} says {shape}: delete "
                "the folder and write the cache again"
            )

    def _mapped(self, i: int) -> dict[str, Tensor]:
        if i not in self._open:
            path = self._path(i)
            with reading_errors(str(path), SafetensorError):
                if file_checksum(path) != self.manifest.shards[i].xxh3:
                    raise UserError(
                        f"{path}: is not the shard that was written (its checksum differs): delete "
                        "the folder and write the cache again"
                    )
                self._open[i] = load_file(path)
        return self._open[i]


def quantized(
    rows: Float[Tensor, "rows L d"],
) -> tuple[Int[Tensor, "rows L d"], Float[Tensor, "rows L"]]:
    """Int8 values, and the scale of each token and block: an error of at most half a scale."""
    scales = rows.float().abs().amax(-1) / 127
    scales = torch.where(scales > 0, scales, 1.0)
    values = (rows.float() / scales.unsqueeze(-1)).round_().clamp_(-127, 127)
    return values.to(torch.int8), scales


def passes_per_shard(manifest: Manifest, pass_tokens: int) -> int:
    """How many passes of so many tokens a shard holds."""
    return max(1, SHARD_BYTES // (manifest.row_bytes * max(1, pass_tokens)))


def require_disk(folder: Path, n_bytes: int, n_tokens: int) -> None:
    """Check that the disk has room.

    Raises:
        UserError: it has not.
    """
    there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if n_bytes > free:
        raise UserError(
            f"cache_activations={str(folder)!r}: {n_tokens:,} tokens take {n_bytes / 1e9:.1f} GB, "
            f"the disk has {free / 1e9:.1f} GB free; read fewer tokens or blocks, take another "
            "disk, or store them in a byte each (cache_dtype='int8')"
        )


def file_checksum(path: Path) -> str:
    """XXH3 of a file's content."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()
