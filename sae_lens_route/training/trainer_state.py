"""State of one SAE's trainer in a checkpoint, without pickle.

| file | holds |
|---|---|
| `trainer_state.safetensors` | Adam's moments and counts by parameter, firing counts by feature |
| `trainer_state.json` | tokens trained on, tokens in the sparsity window, coefficient schedules |

The learning rate is not stored: it is a function of the configuration and the step, and loading
takes the schedule's steps again.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from sae_lens.constants import ACTIVATION_SCALER_CFG_FILENAME
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file
from torch import Tensor

from sae_lens_route.files import write_json, write_tensors

TENSORS_FILENAME = "trainer_state.safetensors"
NUMBERS_FILENAME = "trainer_state.json"
_COUNTS = ("act_freq_scores", "n_forward_passes_since_fired")
_NUMBERS = ("n_training_samples", "n_frac_active_samples", "started_fine_tuning")


def save_trainer_state(trainer: SAETrainer[Any, Any], folder: Path) -> None:
    """Write a trainer's state to a folder."""
    tensors: dict[str, Tensor] = {name: getattr(trainer, name) for name in _COUNTS}
    for name, parameter in trainer.sae.named_parameters():
        for key, value in trainer.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    write_tensors(folder / TENSORS_FILENAME, tensors)
    numbers = {name: getattr(trainer, name) for name in _NUMBERS}
    schedules = {name: each.state_dict() for name, each in trainer.coefficient_schedulers.items()}
    write_json(folder / NUMBERS_FILENAME, {**numbers, "coefficient_schedulers": schedules})
    trainer.activation_scaler.save(str(folder / ACTIVATION_SCALER_CFG_FILENAME))


def load_trainer_state(trainer: SAETrainer[Any, Any], folder: Path) -> None:
    """Continue a new trainer from the state in a folder."""
    # copies: tensors of a file are not aligned in memory, on which the last bits of sums can depend
    tensors = {k: v.clone() for k, v in load_file(folder / TENSORS_FILENAME).items()}
    numbers = json.loads((folder / NUMBERS_FILENAME).read_text(encoding="utf-8"))
    for name in _COUNTS:
        setattr(trainer, name, tensors[name].to(trainer.cfg.device))
    for name in _NUMBERS:
        setattr(trainer, name, numbers[name])
    trainer.n_training_steps = trainer.n_training_samples // trainer.cfg.train_batch_size_samples
    for name, state in numbers["coefficient_schedulers"].items():
        trainer.coefficient_schedulers[name].load_state_dict(state)
    trainer.activation_scaler.load(folder / ACTIVATION_SCALER_CFG_FILENAME)
    _load_optimizer(trainer, tensors)
    with warnings.catch_warnings():  # no step of the optimizer belongs to these
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        for _ in range(trainer.n_training_steps):
            trainer.lr_scheduler.step()


def _load_optimizer(trainer: SAETrainer[Any, Any], tensors: dict[str, Tensor]) -> None:
    state = {
        i: values
        for i, (name, _) in enumerate(trainer.sae.named_parameters())
        if (values := _with_prefix(tensors, f"optimizer.{name}."))
    }
    groups = trainer.optimizer.state_dict()["param_groups"]
    trainer.optimizer.load_state_dict({"state": state, "param_groups": groups})


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
