"""SAELens's trainer with a progress line, a log of JSON lines, whole checkpoints and stops.

SAELens's `SAETrainer` takes the steps; `CheckedTrainer` adds what every SAE's trainer needs, alone
or in a sweep, and `RunTrainer` what the trainer of a whole run needs: the log, checkpoints without
NaN, and stops between steps.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sae_lens import logger
from sae_lens.llm_sae_training_runner import InterruptedException, LLMSaeEvaluator
from sae_lens.saes.sae import TrainingSAE, TrainStepOutput
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import override

from sae_lens_route.data.activations import RoutedActivationsStore
from sae_lens_route.files import append_lines, write_file
from sae_lens_route.saes.routed import uniform_from_the_seed
from sae_lens_route.splice import attach
from sae_lens_route.training.checkpoint import CheckpointFolder
from sae_lens_route.training.health import BLOCK_SHARE, BadStepError, BadSteps, Watch
from sae_lens_route.training.trainer_state import load_trainer_state, save_trainer_state

TRAIN_LOG_FILENAME = "train_log.jsonl"


class TrainLog:
    """The log of a run: a line of JSON for every SAE, every few steps and after the last one.

    Args:
        folder: Where `train_log.jsonl` is written; None writes nothing.
        every: Steps from one record to the next. Only these steps read numbers off the device.
    """

    def __init__(self, folder: str | Path | None, every: int) -> None:
        self.file = None if folder is None else Path(folder) / TRAIN_LOG_FILENAME
        self.every = every
        self._unwritten: list[str] = []

    def is_due(self, trainer: SAETrainer[Any, Any] | MultiSAETrainer) -> bool:
        """Whether the step that the trainer has just taken is recorded."""
        is_last = trainer.n_training_samples >= trainer.cfg.total_training_samples
        return is_last or trainer.n_training_steps % self.every == 0

    def write(self, records: Sequence[Mapping[str, float | int | str]]) -> None:
        """Append records to the file; a number that is not finite becomes null.

        Raises:
            UserError: the disk does not take them; they are kept for the next call.
        """
        if self.file is not None:
            self._unwritten += [json.dumps(_finite(record)) for record in records]
            append_lines(self.file, self._unwritten)
            self._unwritten = []

    def keep_until(self, tokens: int) -> None:
        """Drop what a run that is resumed after `tokens`, or starts, logged later."""
        if self.file is None or not self.file.exists():
            return
        lines = self.file.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [line for line in lines if _tokens(line) <= tokens]
        write_file(self.file, "".join(f"{line}\n" for line in kept))


def _finite(record: Mapping[str, float | int | str]) -> dict[str, float | int | str | None]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }


def _tokens(line: str) -> float:
    """Tokens of a record; infinite for the half line that a killed process leaves."""
    try:
        return float(json.loads(line)["tokens"])
    except (ValueError, KeyError, TypeError):
        return math.inf


@torch.no_grad()
def step_record(trainer: CheckedTrainer, output: TrainStepOutput) -> dict[str, float | int | str]:
    """What is logged of a step: loss, every loss and metric, l0, dead features, learning rate."""
    log = trainer.build_train_step_log_dict(output, trainer.n_training_samples)
    short = {key.split("/", 1)[1]: value for key, value in log.items()}
    loss = short.pop("overall_loss")
    bad = {"bad_steps": trainer.bad_steps.count()} if trainer.bad_steps.skips else {}
    return {
        "step": trainer.n_training_steps,
        "tokens": trainer.n_training_samples,
        "loss": loss,
        **bad,
        **{k: v for k, v in short.items() if k != "n_training_samples" and "legacy" not in k},
    }


class CheckedTrainer(SAETrainer[Any, Any]):
    """SAELens's trainer of one SAE, which counts bad steps and saves its state without pickle.

    Feature frequencies are shares of the vectors that the SAE encodes. SAELens divides by the
    tokens of a batch, but a multi-layer SAE encodes L vectors per token: its
    `sparsity.safetensors` and the L0 in its metadata would be L times too large.

    Args:
        skips_bad_steps: Whether a step whose loss or update is not finite is undone.
        entry: Name of the entry of a sweep, or empty.
    """

    def __init__(
        self, *args: Any, skips_bad_steps: bool = False, entry: str = "", **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.entry, self.is_mid_step = entry, False
        self.bad_steps = BadSteps(self, skips_bad_steps)
        self.watch = Watch(self, entry)

    @override
    def step(self, batch: Tensor) -> TrainStepOutput:
        self.is_mid_step = True
        self.bad_steps.begin()
        output = super().step(batch)
        self.bad_steps.end(output.loss, self.n_training_steps + 1)
        self.n_frac_active_samples += len(output.feature_acts) - self.cfg.train_batch_size_samples
        self.is_mid_step = False
        return output

    @override
    def save_trainer_state(self, checkpoint_path: Path) -> None:
        save_trainer_state(self, checkpoint_path)

    @override
    def load_trainer_state(self, checkpoint_path: Path | str) -> None:
        load_trainer_state(self, Path(checkpoint_path))


class RunTrainer:
    """What the trainer of a run adds to SAELens's, for one SAE or many; precedes it in the bases.

    Args:
        log: Where records go.
        checkpoints: Where checkpoints go; None writes none.
        report_bad_step: Called with the number of the first bad step; saves its batch and returns
            the file.
    """

    def __init__(
        self,
        *args: Any,
        log: TrainLog,
        checkpoints: CheckpointFolder | None,
        report_bad_step: Callable[[int], Path | None],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.log, self.checkpoints, self._report = log, checkpoints, report_bad_step
        self.stop_requested = False
        self._reported: set[str] = set()

    @property
    def each(self) -> Sequence[CheckedTrainer]:
        """The trainers of the SAEs."""
        raise NotImplementedError

    @property
    def is_between_steps(self) -> bool:
        """Whether all SAEs have taken the same steps, each to its end."""
        one_count = len({trainer.n_training_samples for trainer in self.each}) == 1
        return one_count and not any(trainer.is_mid_step for trainer in self.each)

    def require_finite(self) -> None:
        """Look for bad steps; waits for the device.

        Raises:
            BadStepError: there was one, and bad steps are not skipped.
        """
        for trainer in self.each:
            step = trainer.bad_steps.first()
            if step is None or trainer.entry in self._reported:
                continue
            self._reported.add(trainer.entry)
            entry = f"entry {trainer.entry!r}: " if trainer.entry else ""
            file = self._report(step)
            where = "" if file is None else f"; its batch is in {str(file)!r}"
            if trainer.bad_steps.skips:
                logger.warning(f"{entry}step {step} is not finite and was skipped{where}")
                continue
            without = "; a sweep without this entry can resume from there" if entry else ""
            raise BadStepError(
                step,
                f"{entry}the loss or the weights are not finite after step {step}{where}: lower "
                f"lr={trainer.cfg.lr}, look for NaN in the model's activations, or set "
                f"on_bad_step='skip'; no checkpoint was written since, earlier ones are whole"
                f"{without}",
            )

    def _checkpoint_if_needed(self) -> None:
        """Called by `fit` before the step is recorded, which is too early: see `finish_step`."""

    def finish_step(self) -> None:
        """Write the checkpoint that is due, and stop if that is asked for.

        Called after the step is recorded: a run that is killed in between loses no record.
        """
        checkpoint_if_needed: Callable[[], None] = super()._checkpoint_if_needed  # type: ignore[misc]
        checkpoint_if_needed()
        if self.stop_requested:
            raise InterruptedException

    def save_checkpoint(self, checkpoint_name: str, *args: Any, **options: Any) -> None:
        """Write a checkpoint that is whole or absent, and finite."""
        self.require_finite()
        save: Callable[..., None] = super().save_checkpoint  # type: ignore[misc]
        if self.checkpoints is None:
            save(checkpoint_name, *args, **options)
        else:
            with self.checkpoints.new(checkpoint_name) as folder:
                save(folder.name, *args, **options)


class RouteSAETrainer(RunTrainer, CheckedTrainer):
    """The trainer of one SAE, which also logs tokens per second."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._last_record = time.perf_counter(), 0

    @property
    @override
    def each(self) -> Sequence[CheckedTrainer]:
        return [self]

    @override
    def fit(self) -> TrainingSAE[Any]:
        self._last_record = time.perf_counter(), self.n_training_samples
        return super().fit()

    @override
    def _update_pbar(
        self, step_output: TrainStepOutput, pbar: tqdm, update_interval: int = 100
    ) -> None:
        """Called by `fit` at the end of every step."""
        if self.log.is_due(self):
            self.require_finite()
            record = step_record(self, step_output)
            self.watch.see(record)
            self.log.write([{**record, "tokens_per_second": self._tokens_per_second()}])
            pbar.set_description(f"Training {self.sae.cfg.architecture()}")
            pbar.set_postfix_str(_progress(record))
            pbar.update(self.n_training_samples - pbar.n)
        self.finish_step()

    def _tokens_per_second(self) -> float:
        """Rate since the last record."""
        (since, samples), now = self._last_record, time.perf_counter()
        self._last_record = now, self.n_training_samples
        return (self.n_training_samples - samples) / max(now - since, 1e-9)


def _progress(record: Mapping[str, Any]) -> str:
    """Loss, L0 and, with a router, the share of the tokens that each block gets."""
    line = f"loss {record['loss']:.4f}  L0 {record['l0']:.1f}"
    keys = [key for key in record if key.startswith(BLOCK_SHARE)]
    if not keys:
        return line
    blocks = [key.removeprefix(BLOCK_SHARE) for key in keys]
    shares = "/".join(f"{100 * record[key]:.0f}" for key in keys)
    return f"{line}  blocks {blocks[0]}-{blocks[-1]}: {shares} %"


class RoutedEvaluator(LLMSaeEvaluator[Any]):
    """SAELens's evaluation during training (for W&B), with the SAE's hook point attached.

    It leaves no trace in the training: every evaluation reads the same contexts, the first of the
    text, from a stream of its own; uniform routing draws from its seed; and a thread that
    prefetches does not run the model meanwhile.
    """

    activations_store: RoutedActivationsStore

    @override
    def __call__(self, sae: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        training_store = self.activations_store
        with training_store.model_lock, uniform_from_the_seed(sae), attach(self.model, sae):
            evaluator = LLMSaeEvaluator(
                self.model,
                training_store.from_the_start(),
                self.eval_batch_size_prompts,
                self.n_eval_batches,
                self.model_kwargs,
            )
            return evaluator(sae, *args, **kwargs)


@contextmanager
def stop_after_this_step(trainer: Any) -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into a stop at the end of the step; the second one acts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {sig: signal.getsignal(sig) for sig in signals}

    def restore() -> None:
        for sig in signals:
            signal.signal(sig, before[sig])

    def request_stop(*_: Any) -> None:
        trainer.stop_requested = True
        restore()

    for sig in signals:
        signal.signal(sig, request_stop)
    try:
        yield
    finally:
        restore()
