"""Many SAEs on one stream of activations: the language model runs once for all of them.

`SweepRunner` is `RouteSAETrainingRunner` with SAELens's `MultiSAETrainer`: one `SAETrainer` for
each entry, with its own optimizer, schedules and statistics, all of them on views of one batch. On
the CPU, with the same seed, an entry's weights are bit-identical to those of a separate run.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import wandb
from jaxtyping import Float
from sae_lens import SAE
from sae_lens.config import HfDataset, SAETrainerConfig
from sae_lens.constants import SAE_CFG_FILENAME
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig, TrainStepOutput
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.util import str_to_dtype
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import override

from sae_lens_route.config import RouteSAERunnerConfig
from sae_lens_route.errors import UserError
from sae_lens_route.files import new_files, write_json
from sae_lens_route.memory import require_memory
from sae_lens_route.models.kinds import LanguageModel
from sae_lens_route.saes.crosscoder import CrosscoderTrainingConfigMixin
from sae_lens_route.saes.inference import as_routed, to_inference
from sae_lens_route.saes.metadata import crosscoder_hook_name, routed_hook_name
from sae_lens_route.saes.multi_layer import MultiLayerTopKTrainingConfig
from sae_lens_route.saes.router import are_neighbors, normalize, streams_at
from sae_lens_route.training.checkpoint import (
    ENTRIES_FILENAME,
    require_new_folder,
    require_same_entries,
    require_whole,
)
from sae_lens_route.training.entries import SweepEntry, check_entries
from sae_lens_route.training.runner import RouteSAETrainingRunner
from sae_lens_route.training.trainer import CheckedTrainer, RunTrainer, step_record


class SweepRunner(RouteSAETrainingRunner):
    """Trains every entry on one stream of activations and saves each in a folder of its own.

    Args:
        cfg: Model, text, tokens, batch sizes, schedule and output; `cfg.sae` gives only the width.
            The stream, and the order of a shuffle buffer, come from `cfg.seed`.
        entries: What to train, by name; a name is also the name of its folder in `output_path`.
        override_dataset: A dataset instead of the one `cfg.dataset_path` names.
        override_model: A loaded model instead of `cfg.model_name`.

    Raises:
        UserError: anything that would stop the sweep later, named with its entry.
    """

    _not_compared = frozenset({"sae"})

    def __init__(
        self,
        cfg: RouteSAERunnerConfig,
        entries: Mapping[str, SweepEntry],
        override_dataset: HfDataset | None = None,
        override_model: LanguageModel | None = None,
    ) -> None:
        check_entries(cfg, entries)
        self.entries = dict(entries)
        self.saes: dict[str, TrainingSAE[Any]] = {}
        if cfg.routed_blocks is not None:  # otherwise known once the model is loaded
            self._find_sources(cfg)
        super().__init__(cfg, override_dataset, override_model)

    @override
    def _check_folders(self) -> None:
        is_new = self.cfg.output_path is not None and self.cfg.resume_from_checkpoint is None
        if is_new:
            require_new_folder(str(self.cfg.output_path), also_holds="sweep.json")
        super()._check_folders()  # before the entries: a killed sweep may have saved some of them
        if is_new:
            for name in self.entries:
                require_new_folder(Path(str(self.cfg.output_path)) / name)

    def _find_sources(self, cfg: RouteSAERunnerConfig) -> None:
        routed_blocks = list(cfg.routed_blocks or ())
        self._sources = {
            name: _Source.of(name, entry, routed_blocks) for name, entry in self.entries.items()
        }
        self._configs = {
            name: source.sized(name, self.entries[name].sae, cfg.d_model)
            for name, source in self._sources.items()
        }
        if cfg.resume_from_checkpoint is not None:
            blocks = {name: source.blocks for name, source in self._sources.items()}
            checkpoint = require_whole(cfg.resume_from_checkpoint)
            require_same_entries(checkpoint, self._configs, blocks, self._own(cfg))

    @override
    def _check_size(self) -> None:
        """Also checks the entries against the model's blocks, now that they are known."""
        self._find_sources(self.cfg)
        parts = self.memory_estimate()
        need = sum(parts.values())
        if parts["saes"] > need / 2:
            require_memory(need, self.cfg.device, "entries", len(self.entries))
        tokens = self.cfg.train_batch_size_tokens
        require_memory(need, self.cfg.device, "train_batch_size_tokens", tokens)

    def _own(self, cfg: RouteSAERunnerConfig) -> dict[str, dict[str, Any]]:
        """What an entry has of its own besides its configuration and its blocks."""
        return {
            name: {"seed": entry.seed, "lr": entry.lr or cfg.lr}
            for name, entry in self.entries.items()
        }

    @override
    def save_checkpoint(self, checkpoint_path: Path | None) -> None:
        if checkpoint_path is not None:
            write_json(checkpoint_path / ENTRIES_FILENAME, self._own(self.cfg))
        super().save_checkpoint(checkpoint_path)

    def memory_estimate(self) -> dict[str, int]:
        """Memory in bytes that training needs by component, excluding the language model."""
        return sweep_memory(self.cfg, self.entries)

    @override
    def _new_sae(self) -> TrainingSAE[Any]:
        """Build every entry's SAE. Returns the last, because the base class expects one."""
        for name, entry in self.entries.items():
            torch.manual_seed(entry.seed)
            sae = TrainingSAE.from_dict(self._configs[name].to_dict()).to(self.cfg.device)
            self._describe(sae, self._sources[name])
            self.saes[name] = sae
        return self.sae

    def _describe(self, sae: TrainingSAE[Any], source: _Source) -> None:
        """Write the metadata that a separate run would have written."""
        self.sae = sae
        self._set_sae_metadata()
        names = dict(zip(self.cfg.routed_blocks or (), self.cfg.hook_names or (), strict=True))
        metadata = sae.cfg.metadata
        metadata.routed_blocks = list(source.blocks)
        metadata.hook_names = [names[block] for block in source.blocks]
        hook_name = crosscoder_hook_name if source.kind == "crosscoder" else routed_hook_name
        metadata.hook_name = hook_name(source.blocks[-1])

    @override
    def run(self) -> dict[str, SAE[Any]]:  # type: ignore[override]
        """Train all entries; returns the SAEs for inference, by name.

        Ctrl-C and SIGTERM write a checkpoint first; `cfg.resume_from_checkpoint` resumes from one.
        """
        with self._output_folder(), closing(self._batches()) as batches:
            trainer = self._prepared(self._sweep_trainer, batches, list(self.saes.values()))
            with self._rescued(trainer):
                self.run_trainer_with_interruption_handling(trainer)
                with self._decoders_kept(trainer):
                    finished = {name: self._finish(name, trainer) for name in self.saes}
        if self.cfg.logger.log_to_wandb:
            wandb.finish()
        return finished

    def _sweep_trainer(self, batches: Generator[dict[str, Tensor], None, None]) -> _SweepTrainer:
        return _SweepTrainer(
            self.cfg.to_sae_trainer_config(),
            self.saes,
            {name: source.key for name, source in self._sources.items()},
            batches,
            lrs={name: own["lr"] for name, own in self._own(self.cfg).items()},
            skips_bad_steps=self.cfg.on_bad_step == "skip",
            **self._run_options(),
        )

    def _batches(self) -> Generator[dict[str, Tensor], None, None]:
        """Every batch by source, made once however many entries share the source."""
        sources = {source.key: source for source in self._sources.values()}
        with closing(self._stream()) as stream:
            for batch in stream:
                yield {key: source.view(batch) for key, source in sources.items()}

    def _finish(self, name: str, trainer: _SweepTrainer) -> SAE[Any]:
        """The trained SAE for inference, saved if there is an `output_path`."""
        self.sae = training_sae = self.saes[name]
        sae = as_routed(training_sae) if self._sources[name].kind == "normalized" else None
        if self.cfg.output_path is not None:
            sparsity = trainer.trainers[name].log_feature_sparsity
            output = Path(self.cfg.output_path) / name
            with new_files(output, last=SAE_CFG_FILENAME) as folder, self._separate_run(name):
                self.save_final_sae(training_sae, str(folder), sparsity)
                if sae is not None:  # it also carries the normalization of its training input
                    sae.save_model(folder)
        return to_inference(training_sae) if sae is None else sae

    @contextmanager
    def _separate_run(self, name: str) -> Iterator[None]:
        """Within, `cfg` is that of a separate run of the entry: `runner_cfg.json` is written so."""
        sweep, sae = self.cfg, self.saes[name]
        own = copy(sweep)
        trainer_cfg = _with_lr(sweep.to_sae_trainer_config(), self._own(sweep)[name]["lr"])
        own.sae, own.lr, own.lr_end = sae.cfg, trainer_cfg.lr, trainer_cfg.lr_end
        own.routed_blocks = list(sae.cfg.metadata.routed_blocks)
        own.hook_names = list(sae.cfg.metadata.hook_names)
        own.hook_name = sae.cfg.metadata.hook_name
        self.cfg = own
        try:
            yield
        finally:
            self.cfg = sweep


def sweep_memory(cfg: RouteSAERunnerConfig, entries: Mapping[str, SweepEntry]) -> dict[str, int]:
    """Memory in bytes that a sweep needs by component, excluding the language model.

    As `RouteSAERunnerConfig.memory_estimate`, for all entries: `saes` adds up their weights,
    gradients and Adam's two moments. SAELens keeps the outputs of every entry until the step is
    over, so `features` adds up too, except for the gradients, of one entry at a time.

    Args:
        cfg: Configuration of the sweep; its routed blocks are known.
        entries: What it trains.
    """
    one_run, routed_blocks = cfg.memory_estimate(), list(cfg.routed_blocks or ())
    saes, kept, gradients, copies = 0, 0, 0, {}
    for name, entry in entries.items():
        source = _Source.of(name, entry, routed_blocks)
        sae = source.sized(name, entry.sae, cfg.d_model)
        width = str_to_dtype(sae.dtype).itemsize
        saes += 4 * width * (2 * sae.d_in * sae.d_sae + sae.d_sae + 2 * sae.d_in)
        encodes_all = isinstance(sae, MultiLayerTopKTrainingConfig)
        rows = cfg.step_tokens * (len(source.routes) if encodes_all else 1)
        kept += 2 * width * rows * (sae.d_in + sae.d_sae)
        gradients = max(gradients, 2 * width * rows * (sae.d_in + sae.d_sae))
        copies[source.key] = 0 if source.is_view else len(source.routes) * cfg.d_model * width
    return {
        "activations": one_run["activations"] + cfg.step_tokens * sum(copies.values()),
        "shuffle_buffer": one_run["shuffle_buffer"],
        "saes": saes,
        "features": kept + gradients,
    }


@dataclass(frozen=True)
class _Source:
    """The part of a batch `[tokens, L, d]` that an entry is trained on."""

    kind: Literal["routed", "crosscoder", "normalized"]
    """Residual streams for a RouteSAE or a crosscoder, or n(x) of one block."""
    blocks: tuple[int, ...]
    """Blocks that the entry reads."""
    routes: tuple[int, ...]
    """Positions of those blocks among the routed ones."""
    dtype: torch.dtype
    """Dtype that n(x) is computed in: the SAE's, as in a RouteSAE."""

    @classmethod
    def of(cls, name: str, entry: SweepEntry, routed_blocks: list[int]) -> _Source:
        blocks = routed_blocks if entry.blocks is None else entry.blocks
        if not blocks or blocks != [block for block in routed_blocks if block in blocks]:
            raise UserError(
                f"entry {name!r}: blocks={blocks} must ascend and be some of the routed blocks "
                f"{routed_blocks} (routed_blocks)"
            )
        if entry.is_plain and len(blocks) > 1:
            raise UserError(
                f"entry {name!r}: {entry.sae.architecture()!r} has no router and reads one block; "
                f"give blocks=[{blocks[-1]}], or take route_{entry.sae.architecture()}"
            )
        is_crosscoder = isinstance(entry.sae, CrosscoderTrainingConfigMixin)
        return cls(
            "normalized" if entry.is_plain else "crosscoder" if is_crosscoder else "routed",
            tuple(blocks),
            tuple(routed_blocks.index(block) for block in blocks),
            str_to_dtype(entry.sae.dtype),
        )

    @property
    def key(self) -> str:
        normalized = self.kind == "normalized"
        return f"normalized {self.dtype} {self.routes}" if normalized else f"streams {self.routes}"

    @property
    def is_view(self) -> bool:
        """Whether no copy is needed: residual streams that are neighbors in the batch."""
        return self.kind != "normalized" and are_neighbors(self.routes)

    def view(self, batch: Float[Tensor, "tokens L d"]) -> Float[Tensor, "tokens *L d"]:
        """The entry's part of a batch."""
        if self.kind == "normalized":
            return normalize(batch[:, self.routes[0]].to(self.dtype))
        return streams_at(batch, self.routes)

    def sized(self, name: str, sae: TrainingSAEConfig, d_model: int) -> TrainingSAEConfig:
        """The configuration with the number of blocks, and their total width for a crosscoder."""
        if self.kind == "normalized":
            return sae
        changes = {"n_routed_layers": len(self.blocks)}
        if self.kind == "crosscoder":
            changes["d_in"] = len(self.blocks) * d_model
        try:
            return replace(sae, **changes)  # type: ignore[arg-type]
        except UserError as error:  # route_shares of another number of blocks
            raise UserError(f"entry {name!r}: {error}") from error


def _with_lr(cfg: SAETrainerConfig, lr: float) -> SAETrainerConfig:
    """The schedule with another peak, and an end in proportion."""
    return cfg if lr == cfg.lr else replace(cfg, lr=lr, lr_end=(cfg.lr_end or 0.0) * lr / cfg.lr)


class _SweepTrainer(RunTrainer, MultiSAETrainer):
    """SAELens's trainer of many SAEs, with a log and stops between steps."""

    trainers: dict[str, CheckedTrainer]  # type: ignore[assignment]

    def __init__(
        self, *args: Any, lrs: Mapping[str, float], skips_bad_steps: bool, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.trainers = {
            name: CheckedTrainer(
                _with_lr(trainer.cfg, lrs[name]),
                trainer.sae,
                trainer.data_provider,
                skips_bad_steps=skips_bad_steps,
                entry=name,
            )
            for name, trainer in self.trainers.items()
        }

    @property
    @override
    def each(self) -> Sequence[CheckedTrainer]:
        return list(self.trainers.values())

    @override
    def _update_pbar(
        self, step_outputs: dict[str, TrainStepOutput], pbar: tqdm, update_interval: int = 100
    ) -> None:
        """Called by `fit` at the end of every step."""
        if self.log.is_due(self):
            self.require_finite()
            records = [self._record(name, output) for name, output in step_outputs.items()]
            self.log.write(records)
            losses = [float(record["loss"]) for record in records]
            pbar.set_description(f"Training {len(records)} SAEs")
            pbar.set_postfix_str(f"losses {min(losses):.3f} to {max(losses):.3f}")
            pbar.update(self.n_training_samples - pbar.n)
        self.finish_step()

    def _record(self, name: str, output: TrainStepOutput) -> dict[str, float | int | str]:
        trainer = self.trainers[name]
        record = step_record(trainer, output)
        trainer.watch.see(record)
        return {"name": name, **record}
