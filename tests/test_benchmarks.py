"""The benchmarks run, at sizes that say nothing about speed."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from support.command_line import SMALL, write_yaml

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ARGUMENTS = {
    "activation_cache.py": [
        "--config", "{run}", "--training-tokens", 640, "--eval-tokens", 128, "--rounds", 1,
    ],
    "contexts.py": ["--tiny"],
    "evaluation.py": ["--shape", "tiny", "--rounds", 1],
    "routing_collapse.py": ["--training-tokens", 4096, "--eval-tokens", 512, "--seeds", 1],
    "routing_gain.py": ["--training-tokens", 4096, "--eval-tokens", 512, "--seeds", 2],
    "splice.py": ["--tiny"],
    "sweep.py": ["--shape", "tiny", "--steps", 2, "--rounds", 1, "--work", "{tmp}"],
    "synthetic_layers.py": ["--training-tokens", 512, "--eval-tokens", 2048, "--seeds", 1],
    "topk_at_block_11.py": ["--training-tokens", 8192, "--eval-tokens", 512, "--seeds", 1],
    "training_step.py": ["--shape", "tiny", "--rounds", 1, "--work", "{tmp}"],
}  # fmt: skip


@pytest.mark.parametrize("name", ARGUMENTS)
def test_runs_and_writes_json(name, tmp_path, monkeypatch):
    output = tmp_path / "result.json"
    run = write_yaml(tmp_path / "run.yaml", SMALL)
    arguments = [str(a).format(tmp=tmp_path / "work", run=run) for a in ARGUMENTS[name]]
    monkeypatch.syspath_prepend(BENCHMARKS)  # as `python benchmarks/NAME` does
    monkeypatch.setattr(sys, "argv", [name, *arguments, "--output", str(output)])
    runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
    assert json.loads(output.read_text())


def test_every_benchmark_is_run_here():
    assert {path.name for path in BENCHMARKS.glob("*.py")} == {*ARGUMENTS, "random_llama.py"}
