"""The proof that a folder holds a payload: doing to its files what no reader of them may do."""

from __future__ import annotations

import json
import os
import pickle
import runpy
from collections.abc import Iterator
from contextlib import redirect_stderr, suppress
from io import StringIO
from pathlib import Path

import jinja2
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml


def runs_when_executed(folder: Path, marker: Path) -> bool:
    """Whether a payload in a folder runs when its files are unpickled, imported or executed."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            for execute in _EXECUTIONS:
                with suppress(Exception, SystemExit), redirect_stderr(StringIO()):
                    execute(file)
                if marker.exists():
                    marker.unlink()
                    return True
    finally:
        os.chdir(before)
    return False


def _unpickle(file: Path) -> None:
    pickle.loads(file.read_bytes())


def _unpickle_archive(file: Path) -> None:
    with file.open("rb") as opened:
        torch.load(opened, weights_only=False)


def _import(file: Path) -> None:
    if file.suffix == ".py":
        runpy.run_path(str(file))


def _load_unsafely(file: Path) -> None:
    yaml.unsafe_load(file.read_text())


def _render(file: Path) -> None:
    if file.suffix == ".jinja":
        jinja2.Template(file.read_text()).render(messages=[{"content": "x"}])


def _unpickle_extension(file: Path) -> None:
    for field in _schema(file):
        pickle.loads((field.metadata or {})[b"ARROW:extension:metadata"])


def _schema(file: Path) -> Iterator[pa.Field]:
    if file.suffix == ".parquet":
        return iter(pq.read_schema(file))
    with pa.OSFile(str(file)) as source:
        return iter(pa.ipc.open_stream(source).schema)


def _execute_rows(file: Path) -> None:
    if file.suffix == ".csv":
        exec(file.read_text().splitlines()[1].strip('"'))
    else:
        exec(json.loads(file.read_text().splitlines()[0])["text"])


_EXECUTIONS = (
    *(_unpickle, _unpickle_archive, _import, _load_unsafely, _render),
    *(_unpickle_extension, _execute_rows),
)
