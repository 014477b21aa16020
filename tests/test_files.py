"""Files that are whole or absent, whatever fails, and the lock on a folder."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sae_lens_route.errors import UserError
from sae_lens_route.files import (
    append_lines,
    locked,
    new_files,
    new_folder,
    remove_folder,
    remove_unfinished,
    write_file,
    write_json,
    write_tensors,
)

# every call to the system that writes, and where Python makes it
OPERATIONS = {
    "open": (Path, "open"),
    "fsync": (os, "fsync"),
    "replace": (Path, "replace"),
    "rename": (Path, "rename"),
    "mkdir": (Path, "mkdir"),
}
ERRORS = [errno.ENOSPC, errno.EIO, errno.EROFS]


def failing(monkeypatch, operation, code, nth=1):
    """The nth call of an operation, and every later one, fails as it does on a broken disk."""
    owner, name = OPERATIONS[operation]
    real, calls = getattr(owner, name), []

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) >= nth:
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, fail)


def filled(path):
    with new_folder(path) as folder:
        write_json(folder / "a.json", [1])
        with (folder / "b").open("w") as file:  # as SAELens writes
            file.write("b")


def test_files_hold_what_was_written(tmp_path):
    write_file(tmp_path / "text", "text")
    write_json(tmp_path / "x.json", {"a": 1})
    write_tensors(tmp_path / "x.safetensors", {"t": torch.arange(6).view(2, 3).T})
    append_lines(tmp_path / "log", ["1", "2"])
    append_lines(tmp_path / "log", ["3"])
    assert (tmp_path / "text").read_text() == "text"
    assert (tmp_path / "x.json").read_text() == '{"a": 1}'
    assert torch.equal(load_file(tmp_path / "x.safetensors")["t"], torch.arange(6).view(2, 3).T)
    assert (tmp_path / "log").read_text() == "1\n2\n3\n"
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("code", ERRORS)
@pytest.mark.parametrize("operation", ["open", "fsync", "replace"])
def test_a_file_that_cannot_be_replaced_is_as_it_was(tmp_path, monkeypatch, operation, code):
    write_file(tmp_path / "x", "before")
    failing(monkeypatch, operation, code)
    with pytest.raises(UserError, match=f"x' cannot be written: {os.strerror(code)}"):
        write_file(tmp_path / "x", "after")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "before"


@pytest.mark.parametrize("code", ERRORS)
@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize("operation", ["mkdir", "open", "fsync", "replace", "rename"])
def test_a_folder_is_whole_or_absent(tmp_path, monkeypatch, operation, nth, code):
    failing(monkeypatch, operation, code, nth)
    try:
        filled(tmp_path / "new")
    except UserError as error:
        assert os.strerror(code) in str(error)
        whole = False
    else:
        whole = True
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["new"] * whole
    if whole:
        assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a.json", "b"]


def test_a_folder_can_be_replaced_and_removed(tmp_path):
    filled(tmp_path / "x")
    (tmp_path / "x" / "old").touch()
    filled(tmp_path / "x")
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["a.json", "b"]
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    remove_folder(tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_program_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "x"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("nth", [1, 2, 3, 4])
def test_the_last_of_new_files_is_there_only_with_the_others(tmp_path, monkeypatch, nth):
    for name in ("cfg.json", "weights", "other"):
        (tmp_path / name).write_text("before")
    failing(monkeypatch, "replace", errno.ENOSPC, nth)
    try:
        with new_files(tmp_path, last="cfg.json") as folder:
            for name in ("cfg.json", "weights", "a"):
                (folder / name).write_text("after")
    except UserError:
        assert nth < 4
    monkeypatch.undo()
    content = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert content.get("other") == "before"
    assert (content.get("cfg.json") == "after") == (nth == 4)
    if "cfg.json" in content:
        assert content["weights"] == content["a"] == "after"


def test_what_a_killed_process_leaves_is_removed(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path;"
        "from sae_lens_route.files import new_folder\n"
        "with new_folder(Path(sys.argv[1]) / 'deep' / 'x') as folder:\n"
        "    (folder / 'a').touch(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path]).returncode == -9
    assert [path.name for path in (tmp_path / "deep").iterdir()] == [".unfinished-x"]
    (tmp_path / "kept").touch()
    remove_unfinished(tmp_path)
    assert not list((tmp_path / "deep").iterdir()) and (tmp_path / "kept").exists()


def test_a_folder_is_locked_once_until_its_process_dies(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from sae_lens_route.files import locked\n"
        "with locked(Path(sys.argv[1])):\n"
        "    print('locked', flush=True); time.sleep(60)"
    )
    second = locked(tmp_path / "x")
    with locked(tmp_path / "x"), pytest.raises(UserError, match="another run is writing to it"):
        second.__enter__()
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path / "x"], stdout=subprocess.PIPE)
    assert other.stdout is not None and other.stdout.readline() == b"locked\n"
    with pytest.raises(UserError, match="another run is writing"), locked(tmp_path / "x"):
        pass
    other.kill()
    other.wait()
    with locked(tmp_path / "x"):
        pass
