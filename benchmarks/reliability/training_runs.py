"""Small training runs in processes of their own, which other scripts here kill or let fail.

1. `prepare` imports everything and loads the tiny Llama once, on one thread.
2. A `Process` is a fork of that, so a whole run takes about half a second. It runs the commands a
   user runs: `sae-lens-route train --config` and `--resume`, and for a sweep `SweepRunner`.
3. `Files` holds what a run wrote by content: two runs are the same if their files are. Left out are
   the lock, the pointer to the newest checkpoint, tokens per second, paths, and how many
   checkpoints are kept.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "reliability"
MODEL = ROOT / "tests" / "golden" / "tinyllama"
OUTPUT, CONFIG, TEXT, MESSAGES = "run", "run.yaml", "text.jsonl", "messages.txt"
STEP_TOKENS = 64
UNFINISHED = ".unfinished-"

BLOCKS = [3, 5, 7]
SWEEP = {
    "hard": {"d_sae": 96, "k": [4, 8]},
    "uniform": {"d_sae": 96, "k": 8, "routing": "uniform"},
    "plain": {"d_sae": 96, "k": 8, "architecture": "topk", "blocks": [7]},
    "crosscoder": {"d_sae": 96, "k": 8, "architecture": "crosscoder_topk"},
}

_NOT_COMPARED = {"checkpoint_path", "resume_from_checkpoint", "keep_checkpoints", "n_checkpoints"}
_NOT_COMPARED |= {"tokens_per_second"}
_AT_THE_END = ("l0", "num_dead_features")
"""Of an SAE's metadata, which a checkpoint has if only the final save was left."""
_SECONDS = 120.0
"""After which a process that should have ended counts as hanging."""


def prepare() -> None:
    """Import everything and load the model, on one thread: a fork inherits no others."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "disabled"}
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    import torch

    torch.set_num_threads(1)
    import sae_lens_route.cli
    import sae_lens_route.training.sweep  # noqa: F401
    from sae_lens_route.models.load import load_model

    load_model(str(MODEL))
    assert threading.active_count() == 1
    del os.environ["TQDM_DISABLE"]


def versions() -> dict[str, str]:
    """Versions that the recorded numbers belong to."""
    names = ("torch", "sae-lens", "transformer-lens", "transformers", "safetensors")
    return {"python": sys.version.split()[0], **{name: version(name) for name in names}}


@dataclass(frozen=True)
class Scenario:
    """One kind of run.

    Args:
        name: Name in the table.
        fields: Fields of the run that differ from those of `values`.
        is_sweep: Whether it trains many SAEs.
        entries: Which, by name.
    """

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    is_sweep: bool = False
    entries: Mapping[str, Any] = field(default_factory=lambda: SWEEP)

    @property
    def values(self) -> dict[str, Any]:
        """Fields and values of the configuration, with paths in the folder of the process."""
        return {
            "model_name": str(MODEL),
            "dataset_path": TEXT,
            "output_path": OUTPUT,
            "context_size": 16,
            "store_batch_size_prompts": 4,
            "training_tokens": 24 * STEP_TOKENS,
            "n_checkpoints": 5,
            "lr": 0.002,
            "d_sae": 128,
            "k": 8,
            "routed_blocks": BLOCKS,
            "wandb_log_frequency": 1,
            **self.fields,
        }

    def write_inputs(self, folder: Path) -> None:
        """Write the configuration and the text to the folder of a process."""
        folder.mkdir(parents=True)
        (folder / CONFIG).write_text(yaml.safe_dump(self.values))
        draw = random.Random(0)
        # about half of what a run reads, so that it begins the text again
        texts = [_words(draw, draw.randint(4, 40)) for _ in range(40)]
        rows = "".join(f"{json.dumps({'text': text})}\n" for text in texts)
        (folder / TEXT).write_text(rows)

    def train(self) -> None:
        """Train from the start, in the working folder."""
        self._sweep() if self.is_sweep else _command("train", "--config", CONFIG)

    def resume(self) -> None:
        """Resume the run in the working folder."""
        if self.is_sweep:
            self._sweep(resume_from_checkpoint=OUTPUT)
        else:
            _command("train", "--resume", OUTPUT)

    def _sweep(self, **changes: Any) -> None:
        from sae_lens_route.config import runner_config
        from sae_lens_route.errors import UserError
        from sae_lens_route.training.entries import expand_runs
        from sae_lens_route.training.sweep import SweepRunner

        cfg = runner_config({**self.values, **changes})
        try:
            SweepRunner(cfg, expand_runs(self.entries, cfg.d_model, [0])).run()
        except UserError as error:  # as the command line ends
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from error


def _words(draw: random.Random, n: int) -> str:
    syllables = ("ka", "lo", "mi", "ne", "ru", "sta", "ti", "vo")
    return " ".join("".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(n))


def _command(*arguments: str) -> None:
    from sae_lens_route.cli import app

    app(list(arguments))


class Process:
    """An action in a fork, with `folder` as its working folder.

    Args:
        folder: Gets the action's messages, too.
        action: Called in the fork.
    """

    def __init__(self, folder: Path, action: Callable[[], None]) -> None:
        self.folder = folder
        sys.stdout.flush()
        sys.stderr.flush()
        self._code: int | None = None
        self.id = os.fork()
        if self.id == 0:
            _run_in_fork(folder, action)

    def wait(self, seconds: float = _SECONDS) -> int | None:
        """Exit code, negative for a signal; None if it still runs after so many seconds."""
        deadline = time.monotonic() + seconds
        while self._code is None:
            ended, status = os.waitpid(self.id, os.WNOHANG)
            if ended:
                self._code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                break
            else:
                time.sleep(0.002)
        return self._code

    def kill(self) -> bool:
        """SIGKILL; returns whether that is what ended the process."""
        if self._code is None:
            os.kill(self.id, signal.SIGKILL)
            self.wait()
        return self._code == -signal.SIGKILL

    def finish(self) -> int:
        """Exit code of a process that nobody kills.

        Raises:
            RuntimeError: it hangs.
        """
        code = self.wait()
        if code is None:
            self.kill()
            raise RuntimeError(f"a process hangs: {self.messages[-600:]}")
        return code

    @property
    def messages(self) -> str:
        """What the process printed."""
        return (self.folder / MESSAGES).read_text(errors="replace")

    @property
    def last_line(self) -> str:
        """The last line of the messages: the error, if there was one."""
        lines = self.messages.splitlines()
        return lines[-1] if lines else ""


def _run_in_fork(folder: Path, action: Callable[[], None]) -> None:
    code = 1
    try:
        import torch

        torch.set_num_threads(1)  # a fork lacks torch's pool; threads that both make one clash
        os.chdir(folder)
        output = os.open(MESSAGES, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        action()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@dataclass(frozen=True)
class Files:
    """The files of a run by content: path -> SHA-256."""

    final: dict[str, str]
    checkpoints: dict[int, dict[str, str]]
    """By the number of their tokens."""

    @classmethod
    def of(cls, folder: Path) -> Files:
        """What a run with the output folder `folder` left that is not temporary."""
        found = cls({}, {})
        for path in sorted(folder.rglob("*")):
            parts = path.relative_to(folder).parts
            if not path.is_file() or any(part.startswith(".") for part in parts):
                continue
            if parts[0] == "checkpoints":
                files = found.checkpoints.setdefault(int(parts[2]), {})
                files["/".join(parts[3:])] = _digest(path)
            elif parts != ("latest",):
                found.final["/".join(parts)] = _digest(path)
        return found

    @property
    def newest(self) -> int:
        """Tokens of the newest checkpoint; 0 without one."""
        return max(self.checkpoints, default=0)

    def differing_checkpoints(self, whole: Files, lost: Collection[str] = ()) -> list[str]:
        """The checkpoints here that are not those of the undisturbed run, described.

        Args:
            whole: Files of the undisturbed run.
            lost: What is not compared: names of final files, or `checkpoints/TOKENS`.
        """
        return [
            f"checkpoint {tokens}: {_difference(files, whole.checkpoints.get(tokens, {}))}"
            for tokens, files in self.checkpoints.items()
            if files != whole.checkpoints.get(tokens) and f"checkpoints/{tokens}" not in lost
        ]

    def differing_final(self, whole: Files, lost: Collection[str] = ()) -> list[str]:
        """The final files that differ, described, apart from those that are lost."""
        here, there = (
            {k: v for k, v in each.final.items() if k not in lost} for each in (self, whole)
        )
        return [] if here == there else [f"final files: {_difference(here, there)}"]


def _difference(files: Mapping[str, str], whole: Mapping[str, str]) -> str:
    missing, more = sorted(whole.keys() - files), sorted(files.keys() - whole)
    differ = sorted(name for name in files.keys() & whole if files[name] != whole[name])
    return f"missing {missing}, not in the undisturbed run {more}, differ {differ}"


def _digest(path: Path) -> str:
    content = path.read_bytes()
    with suppress(ValueError):  # a line that is half written
        if path.suffix == ".json":
            record = json.loads(content)
            if "checkpoints" in path.parts:
                for name in _AT_THE_END:
                    record.get("metadata", {}).pop(name, None)
            content = json.dumps(_comparable(record)).encode()
        elif path.suffix == ".jsonl":
            records = [_comparable(json.loads(line)) for line in content.splitlines()]
            content = json.dumps(records).encode()
    return hashlib.sha256(content).hexdigest()


def _comparable(content: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key not in _NOT_COMPARED}


def last_logged(folder: Path) -> int:
    """Tokens of the last whole line in the log of the run; 0 without one."""
    log = folder / "train_log.jsonl"
    lines = log.read_text(errors="replace").split("\n")[:-1] if log.exists() else []
    return json.loads(lines[-1])["tokens"] if lines else 0


def lock_is_free(folder: Path) -> bool:
    """Whether nobody holds the lock on the output folder."""
    lock = folder / ".lock"
    if not lock.exists():
        return True
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def unfinished_in(folder: Path) -> Iterator[Path]:
    """Temporary names that a run left."""
    return folder.rglob(f"{UNFINISHED}*")


def undisturbed(scenario: Scenario, folder: Path) -> tuple[Files, float]:
    """The files of a run that nothing happens to, with all its checkpoints, and its seconds.

    Raises:
        RuntimeError: it does not train.
    """
    keeps_all = {key: v for key, v in scenario.fields.items() if key != "keep_checkpoints"}
    scenario = replace(scenario, fields=keeps_all)
    scenario.write_inputs(folder)
    started = time.perf_counter()
    process = Process(folder, scenario.train)
    if process.finish() != 0:
        raise RuntimeError(f"{scenario.name}: the undisturbed run fails: {process.messages}")
    seconds = time.perf_counter() - started
    return Files.of(folder / OUTPUT), seconds


def is_finished(folder: Path, whole: Files) -> bool:
    """Whether the output folder has the files that are written last."""
    return all((folder / name).exists() for name in whole.final if name.endswith("cfg.json"))


def bring_to_an_end(
    scenario: Scenario, folder: Path, whole: Files, lost: Collection[str] = ()
) -> list[str]:
    """Train or resume in the folder of a disturbed run, and compare with the undisturbed one.

    Args:
        scenario: What was trained.
        folder: Working folder of the run.
        whole: Files of the undisturbed run.
        lost: What cannot be as it was: names of final files, or `checkpoints/TOKENS`.

    Returns:
        What differs, is left over, or failed; empty if nothing was lost.
    """
    output = folder / OUTPUT
    newest = Files.of(output).newest
    if not is_finished(output, whole):
        process = Process(folder, scenario.resume if newest else scenario.train)
        if process.finish() != 0:
            return [f"does not resume from {newest} tokens: {process.messages[-600:]}"]
        problems = _resumed_from_another(output, newest)
    else:
        problems = []
    files = Files.of(output)
    problems += files.differing_final(whole, lost) + files.differing_checkpoints(whole, lost)
    return problems + [f"left over: {path}" for path in unfinished_in(output)]


def _resumed_from_another(output: Path, newest: int) -> list[str]:
    for path in output.rglob("runner_cfg.json"):
        if "checkpoints" in path.parts:
            continue
        checkpoint = json.loads(path.read_text())["resume_from_checkpoint"]
        tokens = 0 if checkpoint is None else int(Path(checkpoint).name)
        if tokens != newest:
            return [f"resumed from {tokens} tokens though there is a checkpoint at {newest}"]
    return []
