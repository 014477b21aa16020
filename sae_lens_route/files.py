"""Files and folders that are whole or absent, and a lock on a folder.

Everything is written under a temporary name in the same folder, flushed to the disk (`fsync`) and
renamed. A process that dies, or a disk that is full, leaves what was there before and at most a
temporary name, which `remove_unfinished` deletes.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from sae_lens_route.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_FILENAME = ".lock"
_UNFINISHED = ".unfinished-"

logger = logging.getLogger(__name__)


def write_file(path: Path, content: bytes | str) -> None:
    """Write a file, or replace it, at once.

    Raises:
        UserError: the disk or the folder does not take it; the file is as it was.
    """
    temporary = _temporary(path)
    with disk_errors(path):
        try:
            with temporary.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        _flush(path.parent)


def write_json(path: Path, content: Any) -> None:
    """Write JSON, at once."""
    write_file(path, json.dumps(content))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, at once."""
    write_file(path, safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()}))


def append_lines(path: Path, lines: Sequence[str]) -> None:
    """Append lines to a file: all of them or none, unless the process is killed.

    Raises:
        UserError: the disk or the folder does not take them.
    """
    content = "".join(f"{line}\n" for line in lines).encode()
    with disk_errors(path):
        size = path.stat().st_size if path.exists() else 0
        try:
            with path.open("ab", buffering=0) as file:
                while content:
                    content = content[file.write(content) :]
        except OSError:  # closing the file can fail, too
            with suppress(OSError):
                os.truncate(path, size)
            raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to be filled, which becomes the folder `path` when the block ends.

    A folder that is already there is replaced.

    Raises:
        UserError: the disk or the parent folder does not take it; `path` is as it was, or whole.
    """
    replaced = _temporary(path).with_suffix(".replaced")
    with _temporary_folder(path) as temporary:
        yield temporary
        _flush_tree(temporary)
        if path.exists():
            path.rename(replaced)
        try:
            temporary.rename(path)
        except OSError:
            if replaced.exists():
                replaced.rename(path)
            raise
        _flush(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def new_files(folder: Path, last: str) -> Iterator[Path]:
    """A temporary folder to be filled, whose files move into `folder` when the block ends.

    Args:
        folder: May hold other files.
        last: The file that moves last: where it is, all are.

    Raises:
        UserError: the disk or the folder does not take them.
    """
    with _temporary_folder(folder / "files") as temporary:
        yield temporary
        _flush_tree(temporary)
        (folder / last).unlink(missing_ok=True)  # none of an earlier run while files change
        names = sorted(path.name for path in temporary.iterdir())
        for name in sorted(names, key=lambda name: name == last):
            (temporary / name).replace(folder / name)
        try:
            _flush(folder)
        except OSError:
            (folder / last).unlink()
            raise


def remove_folder(path: Path) -> None:
    """Delete a folder so that no part of it is ever taken for the whole."""
    removed = _temporary(path)
    with disk_errors(path):
        path.rename(removed)
        shutil.rmtree(removed)


def remove_unfinished(folder: Path) -> None:
    """Delete what a killed process left unfinished in a folder and in the folders below.

    What cannot be deleted stays until the next call.

    Raises:
        UserError: the folder cannot be read.
    """
    with disk_errors(folder):
        paths = list(folder.rglob(f"{_UNFINISHED}*"))
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):
            path.unlink(missing_ok=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn errors of the disk within the block into a UserError that names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(
            f"{str(path)!r} cannot be written: {reason}; free or mount the disk, or choose another "
            "output_path"
        ) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock on a folder, which is created; the system releases it when the process dies.

    Raises:
        UserError: another process, or another run in this one, holds the lock.
    """
    path = folder / LOCK_FILENAME
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    try:
        lock(file, f"output_path={str(folder)!r}")
        yield
    finally:
        with suppress(OSError):  # nothing was written to it
            file.close()


def lock(file: IO[Any], name: str) -> None:
    """Lock an open file; the system releases the lock when the file is closed or the process dies.

    Raises:
        UserError: another process, or another run in this one, holds the lock; `name` says on what.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"{name}: another run is writing to it; wait for its end, or choose another"
        ) from error
    except OSError as error:  # a network file system without locks
        logger.warning(f"{name} cannot be locked ({error}): start no second run there")


def _temporary(path: Path) -> Path:
    return path.with_name(f"{_UNFINISHED}{path.name}")


@contextmanager
def _temporary_folder(path: Path) -> Iterator[Path]:
    """An empty folder next to `path`, deleted when the block ends, with errors of the disk named.

    The block holds what fills the folder, too: SAELens's own writing.
    """
    temporary = _temporary(path)
    try:
        with disk_errors(path):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _flush_tree(folder: Path) -> None:
    """Flush every file and folder below `folder` to the disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            _flush(Path(parent) / name)
        _flush(Path(parent))


def _flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    if os.name == "nt" and path.is_dir():  # Windows has no descriptors of folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
