"""The planted bugs of `benchmarks/reliability`: the list fits the package, and bugs are caught.

`make mutants` plants all of them, in minutes; here are two.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "reliability" / "mutants.py"
PACKAGE = ROOT / "sae_lens_route"


def load_script():
    spec = importlib.util.spec_from_file_location("mutants", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutants"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


BUGS = load_script().read_bugs()


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_bug_can_still_be_planted(bug):
    """Its text occurs once, or `planted_in` raises; the planted file compiles, its tests exist."""
    planted = bug.planted_in(PACKAGE)
    assert planted != (PACKAGE / bug.file).read_text()
    compile(planted, bug.file, "exec")
    assert bug.tests and all((ROOT / "tests" / test.split("::")[0]).exists() for test in bug.tests)


def test_bugs_have_names_of_their_own_and_are_many():
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 60
    wings = {bug.file.split("/")[0] for bug in BUGS}
    assert {"evals", "saes", "features", "paper", "plots.py"} <= wings


def plant(*names):
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--only", *names], capture_output=True, text=True, timeout=300
    )


def test_planted_bugs_are_caught_by_their_tests():
    names = ["KL per 256 tokens", "an MLSAE trains on one block"]
    ended = plant(*names)
    assert ended.returncode == 0, ended.stderr
    assert "2 of 2 planted bugs are caught" in ended.stdout
    assert "test_brute_force.py::test_downstream" in ended.stdout
    assert "test_training_numbers.py::test_a_multi_layer_sae_trains" in ended.stdout


def test_a_bug_that_is_not_listed_is_refused():
    ended = plant("no such bug")
    assert ended.returncode == 2 and "no such bugs: no such bug" in ended.stderr
