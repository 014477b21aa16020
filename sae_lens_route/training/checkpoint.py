"""What a checkpoint holds, where it is, and how a run resumes from one.

| file | holds | written by |
|---|---|---|
| `sae_weights.safetensors`, `cfg.json`, `sparsity.safetensors` | the SAE | SAELens's trainer |
| `trainer_state.safetensors`, `trainer_state.json` | optimizer, counts | `trainer_state.py` |
| `activation_scaler.json` | always empty for a RouteSAE | SAELens |
| `uniform_draw.safetensors` | generator of uniform routing, if there is one | `Checkpoint` |
| `run_state.json` | tokens trained on, the text's SHA-256, versions | `Checkpoint` |
| `runner_cfg.json` | configuration of the run | `Checkpoint` |
| `entries.json` | seed and learning rate of each SAE of a sweep | `SweepRunner` |
| `activations_store_state.safetensors` | position in the text | `Checkpoint`, last of all |

In a sweep's checkpoint the files of each SAE are in a folder with the entry's name. A checkpoint is
written under a temporary name and renamed: it is whole or absent. The file `latest` in the output
folder names the newest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from sae_lens import logger
from sae_lens.constants import (
    ACTIVATIONS_STORE_STATE_FILENAME,
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
)
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.sae_trainer import SAETrainer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sae_lens_route.data.training_batches import BatchStore
from sae_lens_route.errors import UserError, reading_errors
from sae_lens_route.files import new_folder, remove_folder, write_file, write_json, write_tensors
from sae_lens_route.saes.routed import RoutedTrainingSAEMixin

UNIFORM_DRAW_FILENAME = "uniform_draw.safetensors"
RUN_STATE_FILENAME = "run_state.json"
LATEST_FILENAME = "latest"
ENTRIES_FILENAME = "entries.json"

_NOT_COMPARED = {"metadata", "device", "sae_lens_version", "sae_lens_training_version"}


class Checkpoint:
    """Saves and restores everything that training depends on.

    Args:
        trainer: Trainer of one SAE or of many; it holds the SAEs.
        store: Source of the training batches.
    """

    def __init__(self, trainer: SAETrainer[Any, Any] | MultiSAETrainer, store: BatchStore) -> None:
        self.trainer, self.store = trainer, store
        # the folder of each SAE inside the checkpoint
        self.trainers: Mapping[str, SAETrainer[Any, Any]] = (
            trainer.trainers if isinstance(trainer, MultiSAETrainer) else {"": trainer}
        )

    def complete(
        self, folder: Path, runner_config: Mapping[str, Any], position: Mapping[str, Tensor]
    ) -> None:
        """Add to what SAELens's trainers saved in `folder` what they leave out.

        Args:
            folder: The checkpoint.
            runner_config: Configuration of the run, as JSON.
            position: `state_dict` of the store after the last batch that was trained on. With
                prefetching the store itself is already ahead.
        """
        for name, trainer in self.trainers.items():
            _save_uniform_draw(trainer.sae, folder / name)
        n_samples = next(iter(self.trainers.values())).n_training_samples
        state = {"n_training_samples": n_samples, "text_sha256": self.store.text_sha256}
        write_json(folder / RUN_STATE_FILENAME, {**state, **_environment(self.trainer.cfg.device)})
        write_json(folder / RUNNER_CFG_FILENAME, runner_config)
        write_tensors(folder / ACTIVATIONS_STORE_STATE_FILENAME, position)

    def restore(self, folder: Path) -> None:
        """Resume trainers, SAEs and the position in the text from a checkpoint.

        Raises:
            UserError: the text is another one, a generator belongs to another kind of device, or a
                file is damaged.
        """
        self._check(run_state(folder), folder)
        with checkpoint_errors(folder):
            for name, trainer in self.trainers.items():
                trainer.load_trainer_state(folder / name)
                trainer.sae.load_weights_from_checkpoint(folder / name)
                _load_uniform_draw(trainer.sae, folder / name)
        n_samples = next(iter(self.trainers.values())).n_training_samples
        for trainer in (self.trainer, *self.trainers.values()):
            trainer.n_training_samples = n_samples
            trainer.n_training_steps = n_samples // trainer.cfg.train_batch_size_samples
            trainer.checkpoint_thresholds = [
                threshold for threshold in trainer.checkpoint_thresholds if threshold >= n_samples
            ]
        with checkpoint_errors(folder):
            self.store.load_from_checkpoint(folder)

    def _check(self, state: Mapping[str, Any], folder: Path) -> None:
        if state["text_sha256"] != self.store.text_sha256:
            raise UserError(
                f"resume_from_checkpoint={str(folder)!r}: the first contexts of the data set, or "
                "the tokenizer, are not those of the interrupted run; give it the same text"
            )
        here = _environment(self.trainer.cfg.device)
        for name, value in here.items():
            if state[name] != value:
                logger.warning(
                    f"resuming with {name}={value} instead of {state[name]}: the last bits of the "
                    "result can differ from those of an uninterrupted run"
                )


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        path: Where they are written, each in a folder with the number of its tokens.
        run_folder: Where the pointer to the newest is written.
        keep: How many of the newest are kept; None keeps all.
    """

    def __init__(self, path: Path, run_folder: Path, keep: int | None) -> None:
        self.path, self.run_folder, self.keep = path, run_folder, keep

    @contextmanager
    def new(self, name: str) -> Iterator[Path]:
        """A temporary folder to be filled, which becomes the checkpoint `name`.

        An older one that cannot be deleted stays until the next checkpoint, or the next start.

        Raises:
            UserError: it cannot be written; earlier checkpoints are as they were.
        """
        with new_folder(self.path / name) as folder:
            yield folder
        self.point_to(self.path / name)
        if self.keep is not None:
            for old in _checkpoints_in(self.path)[: -self.keep]:
                try:
                    remove_folder(old)
                except UserError as error:
                    logger.warning(f"an old checkpoint stays: {error}")

    def point_to(self, checkpoint: Path) -> None:
        """Make a checkpoint the newest of the run."""
        write_file(self.run_folder / LATEST_FILENAME, os.path.relpath(checkpoint, self.run_folder))


def is_whole(folder: Path) -> bool:
    """Whether a folder is a checkpoint that was written to the end."""
    files = (RUN_STATE_FILENAME, ACTIVATIONS_STORE_STATE_FILENAME)
    return all((folder / name).is_file() for name in files)


def checkpoint_errors(folder: Path) -> AbstractContextManager[None]:
    """Turn errors of reading a checkpoint's files into a UserError that names the checkpoint."""
    where = f"resume_from_checkpoint={str(folder)!r}: a file of the checkpoint"
    return reading_errors(where, SafetensorError)


def run_state(folder: Path) -> dict[str, Any]:
    """What `run_state.json` of a checkpoint holds; a UserError if it cannot be read."""
    with checkpoint_errors(folder):
        return json.loads((folder / RUN_STATE_FILENAME).read_text(encoding="utf-8"))


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint in a folder, itself one or that of a run; None if there is none."""
    if is_whole(folder):
        return folder
    parents = [folder, folder / "checkpoints", *folder.glob("checkpoints/*")]
    pointer = folder / LATEST_FILENAME
    if pointer.is_file():
        path = folder / pointer.read_text(encoding="utf-8", errors="replace").strip()
        if is_whole(path):  # a killed run may have written another one, but not the pointer
            parents.append(path.parent)
    found = [path for parent in parents for path in _checkpoints_in(parent)]
    return max(found, key=_n_tokens, default=None)


def require_whole(folder: str | Path) -> Path:
    """The checkpoint, or the newest one of the run in a folder.

    Raises:
        UserError: there is no checkpoint that was written to the end.
    """
    checkpoint = newest_checkpoint(Path(folder))
    if checkpoint is None:
        raise UserError(
            f"resume_from_checkpoint={str(folder)!r}: holds no whole checkpoint; take the folder "
            "of a run or of another checkpoint, or train again from the start"
        )
    return checkpoint


def require_same_entries(
    checkpoint: Path,
    configs: Mapping[str, TrainingSAEConfig],
    blocks: Mapping[str, Sequence[int]],
    own: Mapping[str, Mapping[str, Any]],
) -> None:
    """Check that a sweep's checkpoint is of these entries.

    Args:
        checkpoint: The checkpoint.
        configs: Training configurations by entry.
        blocks: Blocks by entry.
        own: What else an entry has of its own, as `entries.json` holds it.

    Raises:
        UserError: it is not; the message names the entry and the field that differs.
    """
    where = f"resume_from_checkpoint={str(checkpoint)!r}"
    with checkpoint_errors(checkpoint):
        saved_own = json.loads((checkpoint / ENTRIES_FILENAME).read_text(encoding="utf-8"))
    for name, config in configs.items():
        file = checkpoint / name / SAE_CFG_FILENAME
        if not file.exists():
            saved = sorted(entry.parent.name for entry in checkpoint.glob(f"*/{SAE_CFG_FILENAME}"))
            raise UserError(f"{where}: holds no entry {name!r}; it has {', '.join(saved)}")
        saved = json.loads(file.read_text())
        saved["blocks"] = saved["metadata"].get("routed_blocks")
        saved |= saved_own.get(name, {})
        # architecture and blocks first, because other fields follow from them
        wanted = {"architecture": config.architecture(), "blocks": list(blocks[name])}
        wanted |= {**own[name], **config.to_dict(), "metadata": {}}
        wanted = json.loads(json.dumps(wanted))
        for field in wanted:
            if field not in _NOT_COMPARED and wanted[field] != saved.get(field):
                raise UserError(
                    f"{where}: entry {name!r} has {field}={saved.get(field)!r} there, not "
                    f"{wanted[field]!r}; resume with the settings of the interrupted sweep"
                )


def require_new_folder(output_path: str | Path, also_holds: str = SAE_CFG_FILENAME) -> None:
    """Check that a folder does not hold a run yet, so that none is ever overwritten.

    Raises:
        UserError: it does.
    """
    if (Path(output_path) / also_holds).exists():
        raise UserError(
            f"output_path={str(output_path)!r}: already holds a run ({also_holds}); give another "
            "folder or remove it"
        )


def _checkpoints_in(folder: Path) -> list[Path]:
    """Whole checkpoints directly in a folder, the oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.name[0] != "." and is_whole(path)]
    return sorted(found, key=_n_tokens)


def _n_tokens(checkpoint: Path) -> int:
    return int(run_state(checkpoint)["n_training_samples"])


def _environment(device: str) -> dict[str, Any]:
    """What else the last bits of a result depend on."""
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": str(device)}


def _save_uniform_draw(sae: TrainingSAE[Any], folder: Path) -> None:
    generator: torch.Generator | None = getattr(sae, "_generator", None)
    if generator is not None:
        write_tensors(folder / UNIFORM_DRAW_FILENAME, {"generator": generator.get_state()})


def _load_uniform_draw(sae: TrainingSAE[Any], folder: Path) -> None:
    path = folder / UNIFORM_DRAW_FILENAME
    if isinstance(sae, RoutedTrainingSAEMixin) and path.exists():
        generator, state = sae._uniform_generator(sae.device), load_file(path)["generator"]
        if generator is None:
            return
        if state.shape != generator.get_state().shape:
            raise UserError(
                f"resume_from_checkpoint={str(folder)!r}: the draws of uniform routing cannot "
                f"continue on device={str(sae.device)!r}; resume on the kind of device they "
                "began on"
            )
        generator.set_state(state)
