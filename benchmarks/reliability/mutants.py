"""Plant one bug at a time in a copy of the package, and see whether the tests notice.

`planted_bugs.toml` lists the bugs: a file, a text that occurs in it once, what replaces it, and the
tests that should fail.

1. One process imports what is heavy (torch, SAELens, transformers) but not the package, and forks
   for each bug, so a bug costs the package's own import and its tests.
2. The fork writes the bug into a fresh copy, puts the copy first on `sys.path`, and runs the tests
   with `-x`. It reports which test failed, and the folder that the package came from.
3. Before all bugs, the tests of all of them run on a copy without a bug: they must pass, or a
   failure would say nothing.

A bug is *caught* if a test fails, *survives* if all pass, and is *broken* if the tests could not be
collected or the package came from elsewhere: then the record is wrong, not the tests.

    python benchmarks/reliability/mutants.py [--only BUG ...] [--jobs N]
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

import pytest
from tqdm.auto import tqdm

ROOT = Path(__file__).parents[2]
BUGS = Path(__file__).with_name("planted_bugs.toml")
RESULTS = ROOT / "benchmarks" / "results" / "reliability" / "mutants.json"
HEAVY = (
    "torch",
    "transformers",
    "datasets",
    "transformer_lens",
    "sae_lens",
    "hypothesis",
    "matplotlib.figure",
    "plotly.graph_objects",
    "scipy.stats",
    "pyarrow.parquet",
)

Verdict = Literal["caught", "survived", "broken", "passed"]


@dataclass(frozen=True)
class Bug:
    """One bug to plant."""

    name: str
    file: str
    """Below the package's folder."""
    old: str
    """Occurs once in the file."""
    new: str
    tests: tuple[str, ...]
    """Files or node ids below `tests/`."""
    equivalent: str = ""
    """Why no test can fail, if the bug changes nothing that can be observed."""

    def is_meant(self, text: str) -> bool:
        """Whether the text is the bug's name or the beginning of its file."""
        return text == self.name or self.file.startswith(text)

    def planted_in(self, package: Path) -> str:
        """The text of the file with the bug.

        Raises:
            ValueError: `old` does not occur once.
        """
        text = (package / self.file).read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.old!r} occurs {text.count(self.old)} times")
        return text.replace(self.old, self.new)


@dataclass(frozen=True)
class Outcome:
    """What the tests said about one copy of the package."""

    name: str
    verdict: Verdict
    seconds: float
    by: str = ""
    """The test that failed, or what is broken."""


def read_bugs() -> list[Bug]:
    """All bugs of the list, in its order."""
    records = tomllib.loads(BUGS.read_text())["bug"]
    return [Bug(**{**record, "tests": tuple(record["tests"])}) for record in records]


class _Watcher:
    """A pytest plugin that notes the first failure and where the package came from."""

    def __init__(self) -> None:
        self.failed = ""
        self.package = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def pytest_sessionfinish(self) -> None:
        module = sys.modules.get("sae_lens_route")
        self.package = str(Path(module.__file__ or "").parent) if module else ""


def _run_tests(package: Path, tests: Sequence[str]) -> dict[str, Any]:
    """In a fork: run the tests against the copy."""
    sys.path.insert(0, str(package.parent))
    os.environ["PYTHONPATH"] = str(package.parent)  # for tests that start a process
    watcher = _Watcher()
    arguments = ["-x", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "--timeout=120"]
    paths = [str(ROOT / "tests" / test) for test in tests]
    code = int(pytest.main([*arguments, *paths], plugins=[watcher]))
    return {"code": code, "failed": watcher.failed, "package": watcher.package}


def _fork(package: Path, tests: Sequence[str], folder: Path) -> int:
    """Start the tests in a fork that leaves `result.json` and `output.txt`; returns its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        (folder / "result.json").write_text(json.dumps(_run_tests(package, tests)))
        code = 0
    finally:
        os._exit(code)


def _verdict(folder: Path, package: Path) -> tuple[Verdict, str]:
    """The verdict on a finished fork, and the test that failed or what is broken."""
    if not (folder / "result.json").exists():
        return "broken", "the tests did not finish: " + _tail(folder)
    result = json.loads((folder / "result.json").read_text())
    if result["package"] != str(package):
        return "broken", f"the package came from {result['package'] or 'nowhere'}: {_tail(folder)}"
    if result["code"] == pytest.ExitCode.OK:
        return "passed", ""
    if result["code"] == pytest.ExitCode.TESTS_FAILED and result["failed"]:
        return "caught", result["failed"]
    return "broken", f"pytest ended with {result['code']}: {_tail(folder)}"


def _tail(folder: Path) -> str:
    output = folder / "output.txt"
    return output.read_text(errors="replace")[-600:] if output.exists() else ""


class _Run:
    """The tests of one bug, running in a fork on a copy of the package."""

    def __init__(self, name: str, bug: Bug | None, tests: Sequence[str], template: Path) -> None:
        self.name, self.is_bug = name, bug is not None
        self.folder = Path(tempfile.mkdtemp(prefix="mutant-"))
        self.package = self.folder / "sae_lens_route"
        shutil.copytree(template, self.package)
        if bug is not None:
            for stale in (self.package / bug.file).parent.glob(
                f"__pycache__/{Path(bug.file).stem}.*"
            ):
                stale.unlink()
            (self.package / bug.file).write_text(bug.planted_in(self.package))
        self.started = time.perf_counter()
        self.process = _fork(self.package, tests, self.folder)

    def finished(self) -> Outcome:
        """The outcome, once the fork has ended."""
        self.process = 0
        verdict, by = _verdict(self.folder, self.package)
        if verdict == "passed" and self.is_bug:
            verdict = "survived"
        return Outcome(self.name, verdict, round(time.perf_counter() - self.started, 1), by)

    def remove(self) -> None:
        """Delete the copy; kill the fork if it still runs."""
        if self.process:
            os.kill(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
        shutil.rmtree(self.folder, ignore_errors=True)


def outcomes(bugs: Sequence[Bug], jobs: int = 1) -> Iterator[Outcome]:
    """Check the tests on a copy without a bug, then plant each; yields in the order of ending.

    Raises:
        ValueError: a bug does not fit the package.
        RuntimeError: a test fails without any bug.
    """
    with tempfile.TemporaryDirectory(prefix="mutants-") as base:
        template = Path(base) / "sae_lens_route"
        shutil.copytree(
            ROOT / "sae_lens_route", template, ignore=shutil.ignore_patterns("__pycache__")
        )
        for bug in bugs:
            bug.planted_in(template)  # rather now than after minutes
        yield _without_bug(bugs, template)
        waiting, running = list(bugs), dict[int, _Run]()
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    bug = waiting.pop(0)
                    run = _Run(bug.name, bug, bug.tests, template)
                    running[run.process] = run
                ended, _ = os.wait()
                if run := running.pop(ended, None):
                    yield run.finished()
                    run.remove()
        finally:
            for run in running.values():
                run.remove()


def _without_bug(bugs: Sequence[Bug], template: Path) -> Outcome:
    """All tests on a copy as it is, whose compiled modules then serve the copies with bugs."""
    tests = list(dict.fromkeys(test for bug in bugs for test in bug.tests))
    run = _Run("(no bug)", None, tests, template)
    try:
        os.waitpid(run.process, 0)
        outcome = run.finished()
        if outcome.verdict != "passed":
            raise RuntimeError(f"without any bug: {outcome.verdict}, {outcome.by}")
        for compiled in run.package.rglob("__pycache__"):
            shutil.copytree(compiled, template / compiled.relative_to(run.package))
    finally:
        run.remove()
    return outcome


def _import_heavy() -> None:
    """Import what every fork needs, on one thread: a fork inherits no pool of threads."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "disabled"}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in HEAVY:
        importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)
    assert "sae_lens_route" not in sys.modules


def write_results(found: Sequence[Outcome], bugs: Sequence[Bug], seconds: float) -> None:
    """Write the table as JSON, with what is needed to repeat it."""
    by_name = {bug.name: bug for bug in bugs}
    verdicts = [each.verdict for each in found]
    counts = {verdict: verdicts.count(verdict) for verdict in ("caught", "survived", "broken")}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "command": "make mutants",
        "versions": {name: version(name) for name in ("torch", "sae-lens", "transformer-lens")},
        "seconds": round(seconds),
        "planted": len(found),
        **counts,
        "bugs": [
            {**asdict(each), "file": by_name[each.name].file, "new": by_name[each.name].new}
            for each in found
        ],
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


def main() -> int:
    """Plant the bugs, print a line for each; 1 if one survives that is not argued equivalent."""
    parser = argparse.ArgumentParser(description="Plant bugs and see whether the tests notice.")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="BUG",
        help="plant these, by name or the beginning of their file, and write no results",
    )
    parser.add_argument("--jobs", type=int, default=1, help="bugs tried at the same time")
    arguments = parser.parse_args()
    bugs = read_bugs()
    wanted = arguments.only or [""]
    if unknown := [each for each in wanted if not any(bug.is_meant(each) for bug in bugs)]:
        parser.error(f"--only: no such bugs: {', '.join(unknown)}")
    planted = [bug for bug in bugs if any(bug.is_meant(each) for each in wanted)]
    started = time.perf_counter()
    _import_heavy()
    found: list[Outcome] = []
    width = max(len(bug.name) for bug in planted)
    with tqdm(outcomes(planted, arguments.jobs), total=len(planted) + 1, unit="bug") as progress:
        for outcome in progress:
            line = f"{outcome.verdict:9} {outcome.name:{width}}  {outcome.seconds:5.1f} s  "
            progress.write(line + outcome.by.removeprefix("tests/"))
            found.append(outcome)
    found = found[1:]  # the first is the copy without a bug
    if arguments.only is None:
        write_results(found, bugs, time.perf_counter() - started)
    argued = {bug.name for bug in bugs if bug.equivalent}
    caught = [each for each in found if each.verdict == "caught"]
    rest = [each for each in found if each.verdict != "caught"]
    print(f"{len(caught)} of {len(found)} planted bugs are caught")
    for each in rest:
        reason = next(bug.equivalent for bug in bugs if bug.name == each.name)
        print(f"{each.verdict}: {each.name}" + (f" (equivalent: {reason})" if reason else ""))
    return int(any(each.name not in argued or each.verdict == "broken" for each in rest))


if __name__ == "__main__":
    sys.exit(main())
