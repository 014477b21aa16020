"""Let every file operation of a training run fail, resume the run, and compare bit for bit.

1. A run that nobody disturbs is the standard, and its file operations are counted: opening for
   writing, writing, flushing, closing, renaming, making, deleting, truncating and locking.
2. Each of them then fails in a run of its own, with ENOSPC, EIO and EROFS, once or from then on, or
   the process is killed before it (`file_operations.py`). The run must end with one line that names
   the error and says how to resume, or go on to the same files. No checkpoint that was written
   before may be missing, and every one must be the undisturbed run's byte for byte.
3. The run is resumed, now with a disk that works, and its files must be those of the undisturbed
   run, with no temporary name left. Of faults that leave the same files, one is resumed.

    python benchmarks/reliability/write_faults.py [--n FAULTS] [--seed SEED] [--output JSON]
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from file_operations import Fault, Operation, Watcher
from tqdm import std
from tqdm.auto import tqdm
from training_runs import (
    MODEL,
    OUTPUT,
    RESULTS,
    STEP_TOKENS,
    Files,
    Process,
    Scenario,
    bring_to_an_end,
    is_finished,
    last_logged,
    lock_is_free,
    prepare,
    undisturbed,
    versions,
)

STEPS = 5
SHORT = {"training_tokens": STEPS * STEP_TOKENS, "n_checkpoints": 2, "keep_checkpoints": 1}
FEW = {
    "uniform": {"d_sae": 96, "k": 8, "routing": "uniform"},
    "plain": {"d_sae": 96, "k": 8, "architecture": "topk", "blocks": [7]},
}
RUN = Scenario("run", SHORT)
SWEEP = Scenario("sweep", {**SHORT, "n_checkpoints": 1}, is_sweep=True, entries=FEW)
ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS)
_CHECKPOINT = re.compile(r"checkpoints/\w+/(\d+)")
_SPEED = re.compile(rb'"tokens_per_second": [^,}]+')
_SECONDS = 60
"""After which a process that does nothing counts as hanging."""


@dataclass
class Trial:
    """One fault and what came of it."""

    fault: Fault
    operation: Operation
    """The one that failed, or the first that did."""
    outcome: str = ""
    steps_lost: int = 0
    """Steps that were logged and had to be taken again."""
    problems: list[str] = field(default_factory=list)

    @property
    def fault_name(self) -> str:
        """Name of the fault in the table."""
        if self.fault.error is None:
            return "SIGKILL"
        often = "from then on" if self.fault.persistent else "once"
        return f"{errno.errorcode[self.fault.error]} {often}"

    @property
    def target(self) -> str:
        """The operation, without names that differ from run to run."""
        path = re.sub(r"checkpoints/\w+", "checkpoints/ID", self.operation.path)
        return f"{self.operation.kind} {re.sub(r'[.]tmp.+', '.tmp', path)}"

    def __str__(self) -> str:
        return f"{self.fault_name} at operation {self.fault.operation}, {self.target}"


class Experiment:
    """The faults of one kind of run.

    Args:
        scenario: What is trained.
        base: Folder for its runs.
        first: Operations fail while a run of this experiment is resumed, which was killed in its
            second checkpoint; None starts from nothing.
    """

    def __init__(self, scenario: Scenario, base: Path, first: Experiment | None = None) -> None:
        self.scenario, self.base, self.resumes = scenario, base, first is not None
        self.name = f"{scenario.name}, resumed" if self.resumes else scenario.name
        self.killed = base / "killed"
        if first is None:
            fields = {**scenario.fields, "n_checkpoints": STEPS}  # after every step, also the last
            self.whole, _ = undisturbed(replace(scenario, fields=fields), base / "undisturbed")
        else:
            self.whole = first.whole
            self._kill_in_the_second_checkpoint(first.operations)
        self.operations = self._count()
        self.newest_before = Files.of(self.killed / OUTPUT).newest
        self._run = self._prepared_run()
        self._ends: dict[str, list[str]] = {}  # what was found on resuming, by files

    @property
    def faults(self) -> list[Fault]:
        """Every one that there is."""
        numbers = range(1, len(self.operations) + 1)
        failing = [Fault(n, e, often) for n in numbers for e in ERRORS for often in (False, True)]
        return failing + [Fault(n, None) for n in numbers]

    @property
    def n_resumed(self) -> int:
        """How many different folders were resumed."""
        return len(self._ends)

    def try_fault(self, fault: Fault) -> Trial:
        """Run with a fault, look at what it left, resume and compare."""
        folder = self._new_folder("faulty")
        process, operations = _watched(folder, self._run, fault)
        n = fault.operation
        if [each.kind for each in operations[:n]] != [each.kind for each in self.operations[:n]]:
            raise RuntimeError(f"{self.name}: other operations than before: {process.messages}")
        trial = Trial(fault, operations[n - 1])
        self._look_at(folder / OUTPUT, process, operations, trial)
        trial.problems += self._end(folder, fault)
        shutil.rmtree(folder)
        return trial

    def _look_at(
        self, output: Path, process: Process, operations: list[Operation], trial: Trial
    ) -> None:
        """Check how a run ended and what it left."""
        fault, code, messages = trial.fault, process.finish(), process.messages
        files, finished = Files.of(output), is_finished(output, self.whole)
        trial.problems += files.differing_checkpoints(self.whole)
        written = [int(m[1]) for m in _checkpoints_named(operations[: fault.operation - 1])]
        if files.newest < max([*written, self.newest_before]):
            trial.problems.append(f"{written} were written, the newest is {files.newest}")
        if not lock_is_free(output):
            trial.problems.append("the lock is not free")
        if not finished:
            trial.steps_lost = max(0, last_logged(output) - files.newest) // STEP_TOKENS
        if fault.error is None and code == -signal.SIGKILL:
            trial.outcome = "killed"
        elif code == 0 and "Traceback" not in messages:
            trial.outcome = "went on"
            trial.problems += files.differing_final(self.whole)
        elif code == 2 and fault.error is not None and _is_one_line(messages, fault.error):
            trial.outcome = "stopped"
            may_resume = files.newest > self.newest_before and not finished
            if may_resume and "resume with `" not in messages:
                trial.problems.append(f"no word of how to resume: {messages[-600:]}")
        else:
            trial.outcome = "failed"
            trial.problems.append(f"ends with {code}: {messages[-1600:]}")

    def _end(self, folder: Path, fault: Fault) -> list[str]:
        """Resume, unless the same files were resumed before, and compare."""
        files = _digest(folder / OUTPUT)
        # a disk that deletes nothing any more, or a kill, leaves names beside a finished run
        stays = is_finished(folder / OUTPUT, self.whole) and (fault.persistent or not fault.error)
        if files not in self._ends:
            self._ends[files] = bring_to_an_end(self.scenario, folder, self.whole)
        return [p for p in self._ends[files] if not (stays and p.startswith("left over"))]

    def _kill_in_the_second_checkpoint(self, operations: list[Operation]) -> None:
        """Kill a run just before its second checkpoint gets its name."""
        second = _checkpoints_named(operations)[1].string
        n = [each.path for each in operations].index(second) + 1
        self.scenario.write_inputs(self.killed)
        process, _ = _watched(self.killed, self.scenario.train, Fault(n, None))
        assert process.finish() == -signal.SIGKILL

    def _count(self) -> list[Operation]:
        """The operations of the command that a user runs, which must change nothing."""
        folder = self._new_folder("counted")
        command = self.scenario.resume if self.resumes else self.scenario.train
        process, operations = _watched(folder, command)
        files = Files.of(folder / OUTPUT)
        differences = files.differing_final(self.whole) + files.differing_checkpoints(self.whole)
        if process.finish() != 0 or differences:
            raise RuntimeError(f"{self.name}: {differences} {process.messages}")
        return operations

    def _prepared_run(self) -> Callable[[], None]:
        """What the command does once model and text are loaded, in the working folder."""
        from sae_lens_route.config import runner_config
        from sae_lens_route.errors import UserError
        from sae_lens_route.models.load import load_model
        from sae_lens_route.training.entries import expand_runs
        from sae_lens_route.training.runner import RouteSAETrainingRunner
        from sae_lens_route.training.sweep import SweepRunner

        resumed = {"resume_from_checkpoint": OUTPUT} if self.resumes else {}
        cfg, model = runner_config({**self.scenario.values, **resumed}), load_model(str(MODEL))
        before = Path.cwd()
        os.chdir(self._new_folder("prepared"))
        if self.scenario.is_sweep:
            entries = expand_runs(self.scenario.entries, cfg.d_model, [0])
            runner = SweepRunner(cfg, entries, None, model)
        else:
            runner = RouteSAETrainingRunner(cfg, None, model)
        os.chdir(before)

        def run() -> None:
            try:
                runner.run()
            except UserError as error:  # as the command line ends
                print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
                raise SystemExit(2) from error

        return run

    def _new_folder(self, name: str) -> Path:
        """A folder to run in."""
        folder = self.base / name
        if self.resumes:
            shutil.copytree(self.killed, folder)
        else:
            self.scenario.write_inputs(folder)
        return folder


def _watched(
    folder: Path, command: Callable[[], None], fault: Fault | None = None
) -> tuple[Process, list[Operation]]:
    """The process of a command that has ended, and its file operations in the output folder."""
    watcher = Watcher(str(folder / OUTPUT), fault)

    def watched() -> None:
        watcher.be_watched()
        command()

    process = Process(folder, watched)
    watcher.watch(_SECONDS)
    process.finish()
    return process, watcher.operations


def _checkpoints_named(operations: list[Operation]) -> list[re.Match[str]]:
    """The checkpoints that got their names, in order."""
    renamed = [each.path for each in operations if each.kind == "rename" and not each.failed]
    return [match for path in renamed if (match := _CHECKPOINT.fullmatch(path))]


def _is_one_line(messages: str, error: int) -> bool:
    """Whether one line is the error's, and there is no traceback of Python or Rust."""
    lines = [line for line in messages.splitlines() if line.startswith("error: ")]
    unwanted = ("Traceback", "panicked", "Exception ignored")
    named = len(lines) == 1 and os.strerror(error) in lines[0]
    return named and not any(word in messages for word in unwanted)


def _digest(folder: Path) -> str:
    """SHA-256 of every name and file in a folder, temporary ones included."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(re.sub(r"[.]tmp.+", ".tmp", str(path.relative_to(folder))).encode())
        content = path.read_bytes() if path.is_file() else b""
        digest.update(hashlib.sha256(_SPEED.sub(b"", content)).digest())
    return digest.hexdigest()


def run_faults(n: int | None, seed: int, base: Path) -> list[tuple[Experiment, list[Trial]]]:
    """Try every fault of every experiment, or `n` of them."""
    run = Experiment(RUN, base / "run")
    resumed = Experiment(RUN, base / "resumed", first=run)
    experiments = [run, resumed, Experiment(SWEEP, base / "sweep")]
    every = [(i, fault) for i, each in enumerate(experiments) for fault in each.faults]
    chosen = every if n is None else random.Random(seed).sample(every, n)
    results: list[tuple[Experiment, list[Trial]]] = [(each, []) for each in experiments]
    for i, fault in tqdm(chosen, unit="fault", disable=None):
        experiment, trials = results[i]
        trials.append(experiment.try_fault(fault))
        for problem in trials[-1].problems:
            tqdm.write(f"{experiment.name}: {trials[-1]}: {problem}")
    return results


def table(experiment: Experiment, trials: list[Trial]) -> dict[str, Any]:
    """What is recorded of an experiment."""
    names = dict.fromkeys(trial.fault_name for trial in trials)
    kinds = Counter(operation.kind for operation in experiment.operations)

    def outcomes(kind: str, name: str) -> dict[str, int]:
        which = [t for t in trials if (t.operation.kind, t.fault_name) == (kind, name)]
        return dict(Counter(trial.outcome for trial in which))

    return {
        "case": experiment.name,
        "operations": dict(kinds),
        "faults": len(trials),
        "different_folders_resumed": experiment.n_resumed,
        "most_steps_lost": {
            name: max(t.steps_lost for t in trials if t.fault_name == name) for name in names
        },
        "outcomes": {kind: {name: outcomes(kind, name) for name in names} for kind in kinds},
        "went_on": dict(Counter(t.target for t in trials if t.outcome == "went on")),
        "problems": [f"{trial}: {problem}" for trial in trials for problem in trial.problems],
    }


def main() -> int:
    """Try the faults and write the table; 1 if anything was lost."""
    parser = argparse.ArgumentParser(description="Let every file operation of a run fail.")
    parser.add_argument("--n", type=int, help="faults, drawn at random; every one by default")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--output", type=Path, default=RESULTS / "write_faults.json")
    arguments = parser.parse_args()
    tqdm.monitor_interval = 0  # no thread in the process that forks
    std.tqdm.set_lock(threading.RLock())  # its own is shared with forks that are killed
    started = time.perf_counter()
    prepare()
    with tempfile.TemporaryDirectory(prefix="faults-") as base:
        results = run_faults(arguments.n, arguments.seed, Path(base).resolve())
    tables = [table(*result) for result in results]
    n_problems = sum(len(each["problems"]) for each in tables)
    n_faults = sum(each["faults"] for each in tables)
    drawn = "" if arguments.n is None else f" --n {arguments.n} --seed {arguments.seed}"
    content = {
        "command": f"python benchmarks/reliability/write_faults.py{drawn}",
        "versions": versions(),
        "seconds": round(time.perf_counter() - started),
        "faults": n_faults,
        "problems": n_problems,
        "cases": tables,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{n_faults} faults: {n_problems} problems")
    return int(n_problems > 0)


if __name__ == "__main__":
    sys.exit(main())
