"""Calls of the command line, in this process and in one of its own."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner

from sae_lens_route.cli import app
from support.small import TINYLLAMA

SMALL: dict[str, Any] = {
    "model_name": TINYLLAMA,
    "dataset_path": "demo",
    "context_size": 16,
    "store_batch_size_prompts": 4,
    "training_tokens": 640,
    "d_sae": 128,
    "k": 8,
}
"""A run of ten steps."""


def call(*arguments: Any) -> Any:
    """Typer's result of a call, with `exit_code`, `output` and `stdout`."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def as_options(fields: dict[str, Any]) -> list[Any]:
    return [
        part for name, value in fields.items() for part in (f"--{name.replace('_', '-')}", value)
    ]


def error_line(result: Any) -> str:
    """The one line that a mistake ends in."""
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("error:")]
    return line


def write_yaml(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def python(code: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    """The result of a program in a process of its own."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)
