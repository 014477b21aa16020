"""Opening what `dataset_path` names: the demo corpus, local files or a dataset on the Hub."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

from datasets import Dataset, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from sae_lens_route.data.demo_corpus import documents
from sae_lens_route.errors import UserError, reading_errors

_BUILDER_OF_SUFFIX = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".txt": "text",
}


def load_text_dataset(path: str, *, streaming: bool = True) -> Dataset | IterableDataset:
    """Open a dataset with a `text` column, or a pretokenized one with `tokens`.

    Args:
        path: "demo" or "demo:heldout" (the two sides of the demo corpus), a local file or folder
            (jsonl, json, parquet, csv, txt, or `Dataset.save_to_disk`'s), or a Hub dataset.
        streaming: Read rows as they are needed instead of loading everything first.

    Raises:
        UserError: there is nothing to read at `path`; the message says what to do.
    """
    if path in ("demo", "demo:train", "demo:heldout"):
        texts = documents("heldout" if path.endswith("heldout") else "train")
        return Dataset.from_dict({"text": list(texts)})
    local = Path(path).expanduser()
    if local.exists():
        return _load_local(local, streaming)
    if path.startswith((".", "~", os.sep)) or path.count("/") > 1:
        raise UserError(f"dataset_path={path!r}: no such file or folder")
    try:
        return _load_dataset(path, streaming=streaming)
    except (OSError, ValueError) as error:  # unknown, gated, or no network
        raise UserError(
            f"dataset_path={path!r}: neither a local file or folder nor a dataset that can be read "
            f"from the Hub ({type(error).__name__}: {str(error).splitlines()[0]}); 'demo' needs "
            "no network"
        ) from error


def _load_local(path: Path, streaming: bool) -> Dataset | IterableDataset:
    if path.is_dir() and (path / "dataset_info.json").exists():
        with _errors_of(path):
            return cast(Dataset, load_from_disk(str(path)))
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    suffixes = {p.suffix.lower() for p in files} & _BUILDER_OF_SUFFIX.keys()
    builders = {_BUILDER_OF_SUFFIX[suffix] for suffix in suffixes}
    if len(builders) != 1:
        raise UserError(
            f"dataset_path={str(path)!r}: holds {sorted(suffixes) or 'no data files'}; put "
            f"files of one kind there ({', '.join(_BUILDER_OF_SUFFIX)})"
        )
    builder = builders.pop()
    chosen = [str(p) for p in files if _BUILDER_OF_SUFFIX.get(p.suffix.lower()) == builder]
    if not any(Path(file).stat().st_size for file in chosen):
        raise UserError(f"dataset_path={str(path)!r}: the dataset is empty")
    whole_files = {"sample_by": "document"} if builder == "text" else {}
    with _errors_of(path):
        dataset = _load_dataset(builder, data_files=chosen, streaming=streaming, **whole_files)
        next(iter(dataset), None)  # streaming, no file has been read yet
    return dataset


def _errors_of(path: Path) -> AbstractContextManager[None]:
    return reading_errors(f"dataset_path={str(path)!r}", DatasetsError)


def _load_dataset(path: str, **options: Any) -> Dataset | IterableDataset:
    return cast(Dataset | IterableDataset, load_dataset(path, split="train", **options))
