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


def test_every_example_is_run_here():
    tested = {"train.py", "read_and_edit.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested
