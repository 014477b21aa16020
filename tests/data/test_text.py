"""Datasets by path: local files, saved datasets and the demo corpus."""

import json

import pytest
from datasets import Dataset
from support.small import tokens_dataset

from sae_lens_route.data.text import load_text_dataset
from sae_lens_route.errors import UserError


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".txt"])
def test_local_files(tmp_path, suffix, streaming):
    texts = ["first text\nwith two lines", "second text"]
    if suffix == ".jsonl":
        lines = "\n".join(json.dumps({"text": text}) for text in texts)
        (tmp_path / "data.jsonl").write_text(lines)
    elif suffix == ".parquet":
        Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "data.parquet")
    else:
        for i, text in enumerate(texts):
            (tmp_path / f"{i}.txt").write_text(text)
    rows = list(load_text_dataset(str(tmp_path), streaming=streaming))
    assert [row["text"] for row in rows] == texts


def test_saved_dataset_and_demo(tmp_path):
    tokens_dataset().save_to_disk(str(tmp_path / "saved"))
    assert "tokens" in load_text_dataset(str(tmp_path / "saved")).column_names
    assert not set(load_text_dataset("demo")["text"]) & set(
        load_text_dataset("demo:heldout")["text"]
    )


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./nowhere", "no such file or folder"),
        (
            "nobody/nothing-here",
            "neither a local file or folder nor a dataset that can be read",
        ),
    ],
)
def test_missing_datasets_are_named(path, message):
    with pytest.raises(UserError, match=f"dataset_path='{path}': {message}"):
        load_text_dataset(path)


def test_a_folder_of_other_files_is_named(tmp_path):
    (tmp_path / "notes.pdf").write_text("")
    with pytest.raises(UserError, match="holds no data files"):
        load_text_dataset(str(tmp_path))


@pytest.mark.parametrize("name", ["data.jsonl", "data.txt"])
@pytest.mark.parametrize("streaming", [True, False])
def test_an_empty_file_is_refused_by_name(tmp_path, name, streaming):
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"dataset_path=.*the dataset is empty"):
        load_text_dataset(str(tmp_path), streaming=streaming)
