"""Kill training processes with SIGKILL, resume them, and compare with a run nobody touched.

1. For every scenario one run is left alone: its files are the standard.
2. Other runs are killed at random instants, or at the moment a temporary name appears in the
   folder, which is in the middle of a checkpoint or of the final save. After each kill the lock
   must be free, every checkpoint must be one of the undisturbed run's byte for byte, no checkpoint
   may be missing that the log is past, and `train` must refuse the folder and say how to resume.
3. The run is resumed in a new process, which may be killed as well, until it ends. Its weights,
   sparsity, log and checkpoints must be those of the undisturbed run, with no temporary name left.

    python benchmarks/reliability/kills.py [--n KILLS] [--seed SEED] [--output JSON]
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from tqdm import std
from tqdm.auto import tqdm
from training_runs import (
    OUTPUT,
    RESULTS,
    STEP_TOKENS,
    UNFINISHED,
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

Aim = Literal["any instant", "a checkpoint", "the final save"]

EVALUATION = {"log_to_wandb": True, "eval_every_n_wandb_logs": 4, "n_eval_batches": 2}
SHUFFLE = {"activations_mixing_fraction": 0.5, "n_batches_in_buffer": 6}
TOGETHER = {
    **SHUFFLE,
    **EVALUATION,
    "prefetch_llm_batches": 2,
    "routing": "uniform",
    "autocast_lm": True,
    "on_bad_step": "skip",
    "keep_checkpoints": 2,
}
EVERY_STEP = {"n_checkpoints": 23, "keep_checkpoints": 2}
SHORT = {"training_tokens": 6 * STEP_TOKENS, "n_checkpoints": 2}

SCENARIOS: list[tuple[Scenario, Aim]] = [
    (Scenario("in order"), "any instant"),
    (Scenario("shuffle buffer", SHUFFLE), "any instant"),
    (Scenario("prefetching", {"prefetch_llm_batches": 2}), "any instant"),
    (Scenario("uniform routing", {"routing": "uniform"}), "any instant"),
    (Scenario("autocast_lm", {"autocast_lm": True}), "any instant"),
    (Scenario("W&B evaluation", EVALUATION), "any instant"),
    (Scenario("all of these at once", TOGETHER), "any instant"),
    (Scenario("sweep", is_sweep=True), "any instant"),
    (Scenario("checkpoint after every step", EVERY_STEP), "a checkpoint"),
    (Scenario("final save", SHORT), "the final save"),
    (Scenario("final save of a sweep", SHORT, is_sweep=True), "the final save"),
]
_DELAY = 0.012
"""Seconds up to which an aimed kill comes after the temporary name; writing takes about so long."""


@dataclass
class Record:
    """What happened in one scenario."""

    scenario: str
    aim: Aim
    kills: int = 0
    runs: int = 0
    """Runs that were killed at least once and brought to their end."""
    instants: dict[str, int] = field(default_factory=dict)
    """How many kills fell where."""
    most_kills_of_a_run: int = 0
    most_steps_lost: int = 0
    """Steps that were logged and had to be taken again after a kill."""
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


class Killer:
    """Kills runs of one scenario.

    Args:
        scenario: What is trained.
        aim: When it is killed.
        base: Folder in which every run gets one.
        draw: Source of the instants.
    """

    def __init__(self, scenario: Scenario, aim: Aim, base: Path, draw: random.Random) -> None:
        self.scenario, self.aim, self.base, self.draw = scenario, aim, base, draw
        self.record = Record(scenario.name, aim)
        self.whole, self.whole_seconds = undisturbed(scenario, base / "undisturbed")

    def kill_runs(self, n_kills: int, on_kill: Callable[[], object]) -> Record:
        """Kill so many times, in as many runs as that takes."""
        started = time.perf_counter()
        attempts = 0
        while self.record.kills < n_kills:
            attempts += 1
            if attempts > 20 * n_kills:
                self.record.problems.append(f"no kill came in time in {attempts} runs")
                break
            folder = self.base / f"run {attempts}"
            self._kill_one_run(folder, n_kills - self.record.kills, on_kill)
            shutil.rmtree(folder)
        self.record.seconds = round(time.perf_counter() - started, 1)
        return self.record

    def _kill_one_run(self, folder: Path, at_most: int, on_kill: Callable[[], object]) -> None:
        """Start a run, kill and resume it until it ends, and compare."""
        self.scenario.write_inputs(folder)
        output, kills = folder / OUTPUT, 0
        while kills < at_most and (kills == 0 or self.draw.random() < 0.6):
            resumes = Files.of(output).newest > 0
            process = Process(folder, self.scenario.resume if resumes else self.scenario.train)
            self._wait_for_the_instant(process, output)
            if not process.kill():
                if process.finish() != 0:
                    self._note(f"does not train: {process.messages[-600:]}")
                break
            kills += 1
            on_kill()
            self._look_at(folder)
            if is_finished(output, self.whole):
                break
        if kills:
            self.record.runs += 1
            self.record.kills += kills
            self.record.most_kills_of_a_run = max(self.record.most_kills_of_a_run, kills)
        for problem in bring_to_an_end(self.scenario, folder, self.whole):
            self._note(f"after {kills} kills: {problem}")

    def _wait_for_the_instant(self, process: Process, output: Path) -> None:
        """Return at the instant of the kill, or when the process has ended."""
        if self.aim != "the final save":
            process.wait(self.draw.uniform(0, self.whole_seconds))
        if self.aim == "any instant":
            return
        in_a_checkpoint = self.aim == "a checkpoint"
        while process.wait(0) is None:
            if (
                _checkpoint_unfinished(output)
                if in_a_checkpoint
                else _final_save_unfinished(output, self.whole)
            ):
                process.wait(self.draw.uniform(0, _DELAY))
                return

    def _look_at(self, folder: Path) -> None:
        """Check what a kill left."""
        output, record = folder / OUTPUT, self.record
        files, logged = Files.of(output), last_logged(output)
        finished = is_finished(output, self.whole)
        instant = _instant(output, files, self.whole)
        record.instants[instant] = record.instants.get(instant, 0) + 1
        lost = max(0, logged - files.newest) // STEP_TOKENS
        record.most_steps_lost = max(record.most_steps_lost, 0 if finished else lost)
        for problem in files.differing_checkpoints(self.whole):
            self._note(problem)
        # the record of a step comes before its checkpoint, which the kill may have prevented
        expected = max((tokens for tokens in self.whole.checkpoints if tokens < logged), default=0)
        if files.newest < expected:
            self._note(f"the log is at {logged} tokens, the newest checkpoint at {files.newest}")
        if not lock_is_free(output):
            self._note("the lock is not free")
        if files.newest and not finished:
            self._require_refusal(folder)

    def _require_refusal(self, folder: Path) -> None:
        """Check that the same command once more names the run and the way to resume."""
        process = Process(folder, self.scenario.train)
        command = "--resume-from-checkpoint" if self.scenario.is_sweep else "train --resume"
        if process.finish() != 2 or f"{command} {OUTPUT}`" not in process.last_line:
            self._note(f"`{command}` is not named: {process.messages[-600:]}")

    def _note(self, problem: str) -> None:
        self.record.problems.append(problem)


def _checkpoint_unfinished(output: Path) -> bool:
    return any(output.glob(f"checkpoints/*/{UNFINISHED}*"))


def _final_save_unfinished(output: Path, whole: Files) -> bool:
    """Whether final files are being written: of the run, or of an entry of a sweep."""
    parents = {Path(name).parent for name in whole.final}
    return any((output / parent / f"{UNFINISHED}files").exists() for parent in parents)


def _instant(output: Path, files: Files, whole: Files) -> str:
    """Where in the run a kill fell, from what it left."""
    if _checkpoint_unfinished(output):
        return "in a checkpoint"
    if _final_save_unfinished(output, whole):
        return "in the final save"
    if is_finished(output, whole):
        return "after the last file"
    if not output.exists():
        return "before the output folder"
    return "between checkpoints" if files.newest else "before the first checkpoint"


def shares(n: int, parts: int) -> list[int]:
    """`n` in as equal parts as possible."""
    return [n // parts + (i < n % parts) for i in range(parts)]


def kill(n: int, seed: int, base: Path) -> list[Record]:
    """Kill `n` times over all scenarios."""
    records = []
    with tqdm(total=n, unit="kill") as progress:
        for (scenario, aim), share in zip(SCENARIOS, shares(n, len(SCENARIOS)), strict=True):
            if share == 0:
                continue
            progress.set_description(scenario.name)
            draw = random.Random(f"{seed} {scenario.name}")
            killer = Killer(scenario, aim, base / scenario.name.replace("&", ""), draw)
            record = killer.kill_runs(share, progress.update)
            progress.write(_row(record))
            records.append(record)
    return records


def _row(record: Record) -> str:
    where = ", ".join(f"{count} {name}" for name, count in record.instants.items())
    ended = "bit for bit" if not record.problems else f"{len(record.problems)} PROBLEMS"
    return (
        f"{record.scenario:28} {record.kills:4} kills of {record.runs:3} runs  "
        f"at most {record.most_steps_lost:2} steps lost  {ended:12}  ({where})"
    )


def write_results(records: list[Record], arguments: argparse.Namespace, seconds: float) -> None:
    """Write the table as JSON, with what is needed to repeat it."""
    content = {
        "command": f"python benchmarks/reliability/kills.py --n {arguments.n} "
        f"--seed {arguments.seed}",
        "versions": versions(),
        "seconds": round(seconds),
        "kills": sum(record.kills for record in records),
        "runs": sum(record.runs for record in records),
        "instants": dict(sum((Counter(record.instants) for record in records), Counter())),
        "problems": sum(len(record.problems) for record in records),
        "scenarios": [asdict(record) for record in records],
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(content, indent=1) + "\n")


def main() -> int:
    """Kill, print a line for each scenario; 1 if anything was lost."""
    parser = argparse.ArgumentParser(description="Kill training processes and resume them.")
    parser.add_argument("--n", type=int, default=210, help="kills in all")
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    parser.add_argument("--output", type=Path, default=RESULTS / "kills.json")
    arguments = parser.parse_args()
    tqdm.monitor_interval = 0  # no thread in the process that forks
    # tqdm's own lock is shared with the forked processes, and a killed one may hold it
    std.tqdm.set_lock(threading.RLock())
    started = time.perf_counter()
    prepare()
    with tempfile.TemporaryDirectory(prefix="kills-") as base:
        records = kill(arguments.n, arguments.seed, Path(base))
    write_results(records, arguments, time.perf_counter() - started)
    problems = [f"{each.scenario}: {problem}" for each in records for problem in each.problems]
    print("\n".join(problems))
    kills, runs = sum(each.kills for each in records), sum(each.runs for each in records)
    print(f"{kills} kills of {runs} runs: {len(problems)} problems")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
