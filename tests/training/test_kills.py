"""Runs that are killed at any instant end bit for bit as if nobody had touched them.

`benchmarks/reliability/kills.py` kills 210 times; here it kills 30 times, in all its scenarios.
"""

import fcntl
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "benchmarks" / "reliability"
KILLS = 30


@pytest.fixture(scope="module")
def runs():
    """The module that trains in processes of their own and compares what they wrote."""
    spec = importlib.util.spec_from_file_location("training_runs", SCRIPTS / "training_runs.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["training_runs"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    output = tmp_path_factory.mktemp("kills") / "kills.json"
    command = [sys.executable, SCRIPTS / "kills.py", "--n", KILLS, "--output", output]
    ended = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600)
    assert output.exists(), ended.stderr
    return ended, json.loads(output.read_text())


def test_killed_runs_end_bit_for_bit(result):
    ended, content = result
    assert content["problems"] == 0, ended.stdout
    assert ended.returncode == 0
    assert content["kills"] == sum(content["instants"].values()) == KILLS


def test_the_kills_are_aimed_everywhere(result):
    _, content = result
    assert all(scenario["kills"] >= 2 for scenario in content["scenarios"])
    names = {scenario["scenario"] for scenario in content["scenarios"]}
    assert {"shuffle buffer", "prefetching", "sweep", "W&B evaluation", "final save"} <= names
    assert {"a checkpoint", "the final save"} <= {each["aim"] for each in content["scenarios"]}


def test_the_recorded_kills_fall_everywhere():
    """Of 30 kills on a busy machine none may fall into a checkpoint of some milliseconds."""
    recorded = SCRIPTS.parent / "results" / "reliability" / "kills.json"
    content = json.loads(recorded.read_text(encoding="utf-8"))
    assert content["kills"] >= 200 and content["problems"] == 0
    for instant in ("in a checkpoint", "in the final save"):
        fell = sum(each["instants"].get(instant, 0) for each in content["scenarios"])
        assert fell >= 5, instant


# --- the comparison can fail ---------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Output of a run with a checkpoint at 64 tokens, made by hand."""
    output = tmp_path / "run"
    checkpoint = output / "checkpoints" / "id" / "64"
    checkpoint.mkdir(parents=True)
    for path in (output, checkpoint):
        (path / "sae_weights.safetensors").write_bytes(b"weights")
        (path / "runner_cfg.json").write_text('{"lr": 1, "checkpoint_path": "here"}')
        (path / "cfg.json").write_text("{}")
    (output / "train_log.jsonl").write_text('{"tokens": 64, "loss": 1, "tokens_per_second": 5}\n')
    (output / "latest").write_text("checkpoints/id/64")
    (output / ".lock").touch()
    return output


def test_runs_that_differ_in_paths_and_speed_are_the_same(runs, folder, tmp_path):
    whole = runs.Files.of(folder)
    assert whole.newest == 64 and set(whole.checkpoints) == {64}
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "checkpoints" / "id").rename(other / "checkpoints" / "di")
    (other / "runner_cfg.json").write_text('{"lr": 1, "checkpoint_path": "there"}')
    (other / "train_log.jsonl").write_text('{"tokens": 64, "loss": 1, "tokens_per_second": 6}\n')
    assert runs.Files.of(other) == whole
    assert runs.is_finished(other, whole)


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("sae_weights.safetensors", "Weights", "differ ['sae_weights.safetensors']"),
        ("runner_cfg.json", '{"lr": 2}', "differ ['runner_cfg.json']"),
        ("train_log.jsonl", "", "differ ['train_log.jsonl']"),
        ("train_log.jsonl", '{"tokens": 64, "loss": 2}', "differ ['train_log.jsonl']"),
        ("more.json", "{}", "not in the undisturbed run ['more.json']"),
    ],
)
def test_runs_that_differ_are_told_apart(runs, folder, name, content, found):
    whole = runs.Files.of(folder)
    (folder / name).write_text(content)
    (problem,) = runs.Files.of(folder).differing_final(whole)
    assert found in problem


def test_a_checkpoint_with_a_missing_or_another_file_is_told_apart(runs, folder):
    whole = runs.Files.of(folder)
    weights = folder / "checkpoints" / "id" / "64" / "sae_weights.safetensors"
    weights.write_bytes(b"Weights")
    (problem,) = runs.Files.of(folder).differing_checkpoints(whole)
    assert "checkpoint 64" in problem and "differ ['sae_weights.safetensors']" in problem
    weights.unlink()
    (problem,) = runs.Files.of(folder).differing_checkpoints(whole)
    assert "missing ['sae_weights.safetensors']" in problem


def test_locks_temporary_names_and_half_lines_are_seen(runs, folder):
    assert runs.lock_is_free(folder)
    with (folder / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert not runs.lock_is_free(folder)
    assert not list(runs.unfinished_in(folder))
    (folder / "checkpoints" / "id" / ".unfinished-128").mkdir()
    assert len(list(runs.unfinished_in(folder))) == 1
    assert runs.last_logged(folder) == 64
    with (folder / "train_log.jsonl").open("a") as log:
        log.write('{"tokens": 128, "lo')
    assert runs.last_logged(folder) == 64
