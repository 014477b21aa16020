"""The examples run as they stand."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, *arguments):
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout


def test_train_then_read_and_edit(tmp_path):
    folder = tmp_path / "sae"
    assert "routes between blocks [3, 4, 5" in run("train.py", folder, 20_480)
    assert "nats per token" in run("read_and_edit.py", folder)


def test_sweep(tmp_path):
    lines = run("sweep.py", tmp_path / "sweep", 4_096, 256).splitlines()
    assert sum("nats per token" in line for line in lines) == 9
    assert (tmp_path / "sweep" / "kl_by_l0.svg").exists()


def test_every_example_is_run_here():
    tested = {"train.py", "read_and_edit.py", "sweep.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested
