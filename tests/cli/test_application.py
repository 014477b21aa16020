"""Help, start-up and how errors end."""

import re
import subprocess
import sys
import time

from support.command_line import call, error_line, python

from sae_lens_route.cli import app

COMMANDS = [
    "train", "cache", "sweep", "demo", "reproduce",
    "eval", "features", "interpret", "steer", "dashboard", "info",
    "concepts", "smollm2",
]  # fmt: skip


def test_help_lists_the_commands_in_under_a_second():
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        command = [sys.executable, "-m", "sae_lens_route", "--help"]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 1
    listed = re.findall(r"^(?:│ |  )(\w+) ", result.stdout, re.M)
    assert listed == COMMANDS
    assert "--debug" in result.stdout and "sae-lens-route" in result.stdout


def test_the_command_line_imports_nothing_slow():
    slow = ("torch", "sae_lens", "transformer_lens", "transformers", "numpy", "yaml")
    code = f"import sys, sae_lens_route.cli; print([m for m in {slow} if m in sys.modules])"
    assert python(code).stdout.strip() == "[]"


def test_the_installed_command_is_this_application():
    from importlib.metadata import entry_points

    (script,) = entry_points(group="console_scripts", name="sae-lens-route")
    assert script.load() is app


def test_every_command_has_help():
    for command in COMMANDS:
        result = call(command, "--help")
        assert result.exit_code == 0, result.output
        assert command in result.output


BROKEN = """
import sys

from sae_lens_route.cli import app
from sae_lens_route.errors import UserError

class InterruptedException(Exception):  # named as SAELens's, which takes seconds to import
    pass

ERRORS = {
    "user": UserError("k=3:\\n  must be 4"),
    "bug": ValueError("a bug"),
    "import": ImportError("no such name"),
    "ctrl-c": KeyboardInterrupt(),
    "training stopped": InterruptedException(),
}

@app.command()
def fail(kind: str) -> None:
    raise ERRORS[kind]

app(sys.argv[1:])
"""


def test_user_errors_are_one_line_and_bugs_keep_their_traceback():
    result = python(BROKEN, "fail", "user")
    assert result.returncode == 2
    assert result.stderr == "error: k=3: must be 4\n"
    for kind, message in (("bug", "ValueError: a bug"), ("import", "ImportError: no such name")):
        result = python(BROKEN, "fail", kind)
        assert result.returncode == 1
        assert "Traceback" in result.stderr and message in result.stderr


def test_debug_shows_the_traceback_of_user_errors():
    result = python(BROKEN, "--debug", "fail", "user")
    assert result.returncode == 1
    assert "Traceback" in result.stderr and "UserError: k=3:" in result.stderr


def test_an_interruption_is_one_line():
    for kind in ("ctrl-c", "training stopped"):
        result = python(BROKEN, "fail", kind)
        assert (result.returncode, result.stderr) == (130, "stopped\n")


def test_an_unknown_command_is_a_usage_error():
    assert call("trian").exit_code == 2
    assert "no cfg.json" in error_line(call("info", "nowhere"))


def test_saelens_s_interruption_has_the_name_that_is_looked_for():
    from sae_lens.training._interruption import InterruptedException

    assert InterruptedException.__name__ == "InterruptedException"
