"""A file operation that fails, anywhere in a run, loses nothing.

`benchmarks/reliability/write_faults.py` lets every operation fail in every way; here it draws some.
"""

import errno
import fcntl
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sae_lens.constants import ACTIVATIONS_STORE_STATE_FILENAME
from safetensors.torch import save_file
from support.small import small_config

from sae_lens_route.errors import UserError
from sae_lens_route.files import (
    append_lines,
    locked,
    new_files,
    new_folder,
    remove_unfinished,
    write_file,
    write_json,
)
from sae_lens_route.training.checkpoint import (
    RUN_STATE_FILENAME,
    CheckpointFolder,
    newest_checkpoint,
)
from sae_lens_route.training.runner import RouteSAETrainingRunner

SCRIPTS = Path(__file__).parents[2] / "benchmarks" / "reliability"
FAULTS = 15
SECONDS = 60

pytestmark = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"),
    reason="file operations are watched by Linux's seccomp, by numbers of x86-64",
)


@pytest.fixture(scope="module")
def watching():
    """The module that watches file operations."""
    spec = importlib.util.spec_from_file_location("file_operations", SCRIPTS / "file_operations.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["file_operations"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def attempt(watching, tmp_path):
    """`attempt(action, fault)` in a fork: its exit code, 2 for a UserError, and its operations."""

    def attempt(action, fault=None):
        watcher = watching.Watcher(str(tmp_path), fault)
        process = os.fork()
        if process == 0:
            code = 1
            try:
                watcher.be_watched()
                action()
                code = 0
            except UserError:
                code = 2
            finally:
                os._exit(code)
        try:
            watcher.watch(SECONDS)
        except OSError as error:
            pytest.skip(f"no process may watch another here: {error}")
        finally:
            _, status = os.waitpid(process, 0)
        return os.waitstatus_to_exitcode(status), watcher.operations

    return attempt


def faults_of(watching, operations):
    """Every operation fails once."""
    return [watching.Fault(n, errno.EIO) for n in range(1, len(operations) + 1)]


# --- whole runs ----------------------------------------------------------------------------------


def test_a_fault_anywhere_loses_nothing(attempt, tmp_path):
    attempt(tmp_path.exists)  # skips where nothing can be watched
    output = tmp_path / "faults.json"
    command = [sys.executable, SCRIPTS / "write_faults.py", "--n", FAULTS, "--output", output]
    ended = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600)
    assert output.exists(), ended.stderr
    content = json.loads(output.read_text())
    assert content["problems"] == 0 and ended.returncode == 0, ended.stdout
    assert content["faults"] == sum(case["faults"] for case in content["cases"]) == FAULTS
    kinds = {kind for case in content["cases"] for kind in case["operations"]}
    assert kinds >= {"open", "write", "fsync", "close", "rename", "mkdir", "unlink", "flock"}
    ends = {
        outcome
        for case in content["cases"]
        for by_fault in case["outcomes"].values()
        for outcomes in by_fault.values()
        for outcome in outcomes
    }
    assert "stopped" in ends and ends <= {"stopped", "went on", "killed"}


@pytest.mark.parametrize("prevented", [1, 2])
def test_the_pointer_to_checkpoints_elsewhere_is_written_again_or_not_needed(
    tinyllama, tmp_path, monkeypatch, caplog, prevented
):
    point_to, calls = CheckpointFolder.point_to, []

    def failing(self, checkpoint):
        calls.append(checkpoint)
        if len(calls) <= prevented:
            raise UserError("no pointer")
        point_to(self, checkpoint)

    monkeypatch.setattr(CheckpointFolder, "point_to", failing)
    options = {"n_checkpoints": 1, "checkpoint_path": str(tmp_path / "elsewhere")}
    cfg = small_config(tmp_path / "run", **options)
    with pytest.raises(UserError, match="no pointer"):
        RouteSAETrainingRunner(cfg, None, tinyllama).run()
    folder = tmp_path / "run" if prevented == 1 else cfg.checkpoint_path
    assert f"resume with `sae-lens-route train --resume {folder}`" in caplog.text
    assert newest_checkpoint(Path(folder)) is not None


# --- files ---------------------------------------------------------------------------------------


def test_a_failed_append_changes_nothing(watching, attempt, tmp_path):
    path = tmp_path / "log"

    def action():
        append_lines(path, ["second", "third"])

    append_lines(path, ["first"])
    _, operations = attempt(action)
    assert [each.kind for each in operations] == ["open", "write", "close"]
    for fault in faults_of(watching, operations):
        path.write_text("first\n")
        assert attempt(action, fault)[0] == 2
        assert path.read_text() == "first\n", fault


def test_a_replaced_folder_is_the_old_or_the_new_one(watching, attempt, tmp_path):
    path = tmp_path / "folder"

    def action():
        with new_folder(path) as folder:
            (folder / "new").write_text("new")

    action()
    _, operations = attempt(action)
    ends = set()
    for fault in faults_of(watching, operations):
        code, _ = attempt(action, fault)
        remove_unfinished(tmp_path)
        assert [each.read_text() for each in path.iterdir()] == ["new"], fault
        assert list(tmp_path.iterdir()) == [path]
        ends.add(code)
    assert ends == {0, 2}  # deleting what was replaced may fail


def test_files_that_moved_have_their_last_one_only_if_nothing_failed(watching, attempt, tmp_path):
    def action():
        with new_files(tmp_path / "run", last="cfg.json") as folder:
            for name in ("cfg.json", "weights"):
                write_file(folder / name, name)

    _, operations = attempt(action)
    for fault in faults_of(watching, operations):
        (tmp_path / "run" / "cfg.json").unlink(missing_ok=True)
        code, _ = attempt(action, fault)
        assert (tmp_path / "run" / "cfg.json").exists() == (code == 0), fault


def test_what_cannot_be_deleted_or_closed_stops_nothing(watching, attempt, tmp_path):
    def unfinished():
        write_file(tmp_path / "run" / ".unfinished-file", "")

    def action():
        with locked(tmp_path / "run"):
            remove_unfinished(tmp_path / "run")

    (tmp_path / "run").mkdir()
    unfinished()
    _, operations = attempt(action)
    for fault in faults_of(watching, operations):
        unfinished()
        opens_the_lock = operations[fault.operation - 1].kind == "open"
        assert attempt(action, fault)[0] == (2 if opens_the_lock else 0), fault


def test_an_old_checkpoint_that_cannot_be_deleted_stops_nothing(watching, attempt, tmp_path):
    checkpoints = CheckpointFolder(tmp_path / "checkpoints", tmp_path, keep=1)

    def save(n_tokens):
        with checkpoints.new(str(n_tokens)) as folder:
            write_json(folder / RUN_STATE_FILENAME, {"n_training_samples": n_tokens})
            write_json(folder / ACTIVATIONS_STORE_STATE_FILENAME, {})

    save(64)
    _, operations = attempt(lambda: save(128))
    deleting = [each.path for each in operations].index("checkpoints/.unfinished-64") + 1
    for n in range(deleting, len(operations) + 1):
        shutil.rmtree(tmp_path / "checkpoints")
        save(64)
        assert attempt(lambda: save(128), watching.Fault(n, errno.EIO))[0] == 0
        assert newest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "128"


# --- the watcher sees and does what it says ------------------------------------------------------


def test_every_operation_under_the_folder_is_seen(attempt, tmp_path):
    folder = tmp_path / "a"

    def action():
        folder.mkdir()
        with (folder / "x").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write("text")
            file.flush()
            os.fsync(file.fileno())
            file.truncate(2)
        (folder / "x").read_text()
        (folder / "x").rename(folder / "y")
        os.link("y", "z", src_dir_fd=(parent := os.open(folder, os.O_RDONLY)), dst_dir_fd=parent)
        for name in ("y", "z"):
            os.unlink(name, dir_fd=parent)
        os.fsync(parent)
        folder.rmdir()
        Path("/dev/null").write_text("elsewhere")

    code, operations = attempt(action)
    assert code == 0
    assert [" ".join(each[:2]) for each in operations] == [
        *("mkdir a", "open a/x", "flock a/x", "write a/x", "fsync a/x", "truncate a/x"),
        *("close a/x", "rename a/y", "link a/z", "unlink a/y", "unlink a/z", "fsync a", "rmdir a"),
    ]


def test_calls_that_bypass_the_c_library_are_seen(watching, attempt, tmp_path):
    """Safetensors' last call is a rename from Rust."""
    path = tmp_path / "x.safetensors"

    def action():
        save_file({"x": torch.zeros(2)}, path)

    _, operations = attempt(action)
    n = [each.path for each in operations].index(path.name) + 1
    assert operations[n - 1].kind == "rename"
    path.unlink()
    assert attempt(action, watching.Fault(n, errno.ENOSPC))[0] == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_the_operations_that_fail_are_those_of_the_fault(
    watching, attempt, tmp_path, error, persistent
):
    """Of opening, writing, closing, renaming and deleting, from the second on."""

    def action():
        file = os.open(tmp_path / "x", os.O_WRONLY | os.O_CREAT)
        for call in (
            lambda: os.write(file, b"half of it"),
            lambda: os.close(file),
            lambda: (tmp_path / "x").rename(tmp_path / "y"),
            lambda: (tmp_path / "x").unlink(),
        ):
            try:
                call()
            except OSError as failure:
                assert failure.errno in (error, errno.ENOENT)

    code, operations = attempt(action, watching.Fault(2, error, persistent))
    assert code == 0
    failed = {each.kind for each in operations if each.failed}
    if not persistent:
        assert failed == {"write"}
        assert (tmp_path / "y").read_bytes() == b"half "
    else:
        full = error == errno.ENOSPC
        assert failed == {"write", "rename"} | (set() if full else {"close", "unlink"})
        assert (tmp_path / "x").exists() == (not full)


def test_a_process_is_killed_before_the_operation(watching, attempt, tmp_path):
    def action():
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()

    code, operations = attempt(action, watching.Fault(2, None))
    assert code == -signal.SIGKILL and len(operations) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
