"""`RouteSAETrainingRunner`: from a configuration to a trained SAE on disk.

1. The model is loaded, and what the configuration leaves open is resolved against the model.
   Anything that does not fit, or that is not the run to be resumed, fails here, before training.
2. `RoutedActivationsStore` yields batches `[tokens, L, d]`, read ahead if that is asked for.
3. `RouteSAETrainer` takes the steps, from the start or from a checkpoint. Whatever ends them early,
   a checkpoint of the last finished step is written first.
4. The SAE is saved in SAELens's files. The output folder is locked from the first step to here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
import wandb
from sae_lens import logger
from sae_lens.config import HfDataset
from sae_lens.constants import SAE_CFG_FILENAME
from sae_lens.llm_sae_training_runner import LanguageModelSAETrainingRunner
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.prefetch import PrefetchingIterator
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from typing_extensions import override

from sae_lens_route.config import RouteSAERunnerConfig
from sae_lens_route.data.activation_cache import ActivationCache
from sae_lens_route.data.activations import RoutedActivationsStore
from sae_lens_route.data.cached_store import CachedActivationsStore
from sae_lens_route.data.training_batches import BatchStore
from sae_lens_route.errors import UserError
from sae_lens_route.files import locked, new_files, remove_unfinished, write_tensors
from sae_lens_route.memory import require_device, require_memory
from sae_lens_route.models.kinds import LanguageModel
from sae_lens_route.models.load import load_model
from sae_lens_route.saes.routed import RoutedTrainingSAEMixin
from sae_lens_route.training.checkpoint import (
    Checkpoint,
    CheckpointFolder,
    is_whole,
    newest_checkpoint,
)
from sae_lens_route.training.health import BadStepError
from sae_lens_route.training.resume import (
    prepare_resume,
    require_fresh_folder,
    require_same_run,
    resume_hint,
)
from sae_lens_route.training.trainer import (
    RoutedEvaluator,
    RouteSAETrainer,
    RunTrainer,
    TrainLog,
    stop_after_this_step,
)

_T = TypeVar("_T", bound=RunTrainer)


class RouteSAETrainingRunner(LanguageModelSAETrainingRunner):
    """SAELens's training runner for RouteSAEs and crosscoders: same files, same logging.

    Args:
        cfg: What to train; resolved against the model here.
        override_dataset: A dataset instead of the one `cfg.dataset_path` names.
        override_model: A loaded model instead of `cfg.model_name`.
        override_sae: An SAE to train on, instead of a new one.

    Raises:
        UserError: anything about the configuration, the model or the data that would stop the
            run later; the message names the field.
    """

    cfg: RouteSAERunnerConfig
    activations_store: BatchStore
    evaluator: RoutedEvaluator | None
    _not_compared: frozenset[str] = frozenset()
    """Fields of the configuration that do not belong to a run of this kind."""

    def __init__(
        self,
        cfg: RouteSAERunnerConfig,
        override_dataset: HfDataset | None = None,
        override_model: LanguageModel | None = None,
        override_sae: TrainingSAE[Any] | None = None,
    ) -> None:
        self.cfg = cfg
        require_device(cfg.device)
        self._check_folders()
        cache = None if cfg.cache_activations is None else ActivationCache(cfg, override_dataset)
        self._model, needs_model = override_model, cache is None or not cache.replaces_the_model()
        if override_model is not None or needs_model:
            cfg.resolve(self.model)
        if cfg.resume_from_checkpoint is not None:
            require_same_run(cfg, self._not_compared)
        self._check_size()
        self.activations_store = self._store(cache, override_dataset)
        torch.manual_seed(cfg.seed)
        try:
            self.sae = self._new_sae() if override_sae is None else override_sae
        except (ValueError, FileNotFoundError) as error:  # SAELens's own checks
            raise UserError(str(error)) from error
        self.sae.to(cfg.device)
        self.evaluator = None
        if isinstance(self.activations_store, RoutedActivationsStore):
            self.evaluator = RoutedEvaluator(
                model=self.model,
                activations_store=self.activations_store,
                eval_batch_size_prompts=cfg.eval_batch_size_prompts,
                n_eval_batches=cfg.n_eval_batches,
                model_kwargs=cfg.model_kwargs,
            )

    @property
    def model(self) -> LanguageModel:
        """The language model; loaded when it is first used, for a cache may replace it."""
        if self._model is None:
            self._model = self._load_model()
        return self._model

    def _store(self, cache: ActivationCache | None, dataset: HfDataset | None) -> BatchStore:
        """Where batches come from: a cache that has them all, or the model, with a cache or not."""
        if self._model is None:
            assert cache is not None
            return CachedActivationsStore(self.cfg, cache.shards())
        self._compile_llm_if_needed()
        store = RoutedActivationsStore.from_config(self.model, self.cfg, override_dataset=dataset)
        if cache is not None:
            cache.attach(store)
        return store

    def _check_folders(self) -> None:
        """Raise if the run would overwrite another, or resumes from a checkpoint of another."""
        if self.cfg.resume_from_checkpoint is not None:
            prepare_resume(self.cfg, self._not_compared)
        elif self.cfg.extend_run:
            raise UserError("extend_run=True: name the run in resume_from_checkpoint (--resume)")
        elif self.cfg.output_path is not None:
            require_fresh_folder(self.cfg.output_path)

    def _check_size(self) -> None:
        """Raise if what is to be trained does not fit in memory."""
        cfg = self.cfg
        need = sum(cfg.memory_estimate().values())
        require_memory(need, cfg.device, "train_batch_size_tokens", cfg.train_batch_size_tokens)

    def _load_model(self) -> LanguageModel:
        return load_model_of_run(self.cfg)

    def _new_sae(self) -> TrainingSAE[Any]:
        if self.cfg.from_pretrained_path is not None:
            return TrainingSAE.load_from_disk(self.cfg.from_pretrained_path, self.cfg.device)
        return TrainingSAE.from_dict(
            TrainingSAEConfig.from_dict(self.cfg.get_training_sae_cfg_dict()).to_dict()
        )

    @override
    def _set_sae_metadata(self) -> None:
        super()._set_sae_metadata()
        self.sae.cfg.metadata.hook_names = self.cfg.hook_names
        self.sae.cfg.metadata.routed_blocks = self.cfg.routed_blocks

    @override
    def run(self) -> TrainingSAE[Any]:
        """Train, save to `output_path`, and return the trained SAE.

        Ctrl-C, SIGTERM and errors of the data or the disk write a checkpoint first.

        Raises:
            UserError: another run writes to `output_path`, the data or the disk fails, or a loss is
                not finite. A hint at how to resume is logged.
        """
        with self._output_folder(), closing(self._stream()) as batches:
            self._set_sae_metadata()
            trainer = self._prepared(self._trainer, batches, [self.sae])
            with self._rescued(trainer):
                self.run_trainer_with_interruption_handling(trainer)
                with self._decoders_kept(trainer):
                    self._finish_one(trainer)
        if self.cfg.logger.log_to_wandb:
            wandb.finish()
        return self.sae

    @contextmanager
    def _decoders_kept(self, trainer: RunTrainer) -> Iterator[None]:
        """Undo the normalization of the final save on any error: a checkpoint follows."""
        decoders = [each.sae.W_dec.detach().to("cpu", copy=True) for each in trainer.each]
        try:
            yield
        except BaseException:
            for each, W_dec in zip(trainer.each, decoders, strict=True):
                each.sae.W_dec.data.copy_(W_dec)
            raise

    def _finish_one(self, trainer: RouteSAETrainer) -> None:
        if isinstance(self.sae, RoutedTrainingSAEMixin) and self.sae.cfg.decoder_norm_interval > 0:
            self.sae.normalize_decoder()
        if self.cfg.output_path is not None:
            with new_files(Path(self.cfg.output_path), last=SAE_CFG_FILENAME) as folder:
                self.save_final_sae(self.sae, str(folder), trainer.log_feature_sparsity)

    def _trainer(self, batches: Generator[Tensor, None, None]) -> RouteSAETrainer:
        return RouteSAETrainer(
            cfg=self.cfg.to_sae_trainer_config(),
            sae=self.sae,
            data_provider=batches,
            evaluator=self.evaluator,
            skips_bad_steps=self.cfg.on_bad_step == "skip",
            **self._run_options(),
        )

    def _run_options(self) -> dict[str, Any]:
        """Options of every trainer of a run."""
        cfg = self.cfg
        checkpoints = None
        if cfg.checkpoint_path is not None:
            path = Path(cfg.checkpoint_path)
            pointer = path if cfg.output_path is None else Path(cfg.output_path)
            checkpoints = CheckpointFolder(path, pointer, cfg.keep_checkpoints)
        return {
            "save_checkpoint_fn": self.save_checkpoint,
            "log": TrainLog(cfg.output_path, cfg.logger.wandb_log_frequency),
            "checkpoints": checkpoints,
            "report_bad_step": self._save_batch_of,
        }

    @contextmanager
    def _output_folder(self) -> Iterator[None]:
        """Create and lock the output folder, which must still be free."""
        output = self.cfg.output_path
        lock = nullcontext() if output is None else locked(Path(output))
        with lock:
            if self.cfg.resume_from_checkpoint is None and output is not None:
                self._check_folders()
            if output is None:
                yield
                return
            remove_unfinished(Path(output))
            yield
            with suppress(UserError):  # what could not be deleted when its time came
                remove_unfinished(Path(output))

    def _prepared(
        self,
        make_trainer: Callable[[Any], _T],
        batches: Generator[Any, None, None],
        saes: Sequence[TrainingSAE[Any]],
    ) -> _T:
        """The trainer, from the checkpoint if one is given."""
        cfg = self.cfg
        self._start_wandb()
        trainer = make_trainer(batches)
        assert isinstance(trainer, SAETrainer | MultiSAETrainer)
        self._checkpoint = Checkpoint(trainer, self.activations_store)
        if cfg.resume_from_checkpoint is not None:
            self._checkpoint.restore(Path(cfg.resume_from_checkpoint))
        self._n_steps = trainer.n_training_steps
        # from the one before the oldest step that no record has covered yet
        n_positions = cfg.logger.wandb_log_frequency + 1
        self._positions: deque[Mapping[str, Tensor]] = deque(maxlen=n_positions)
        trainer.log.keep_until(trainer.n_training_samples)
        for self.sae in saes:  # SAELens compiles the one at `self.sae`
            self._compile_sae_if_needed()
        return trainer

    def _stream(self) -> Generator[Tensor, None, None]:
        """Every batch, read ahead if that is asked for.

        Keeps the positions in the text after the last batches, for `save_checkpoint` and to make a
        batch again; with prefetching the store itself is already ahead.
        """
        store = self.activations_store
        self._positions.append(store.state_dict())
        stream = ((batch, store.state_dict()) for batch in store)
        if self.cfg.prefetch_llm_batches:
            stream = PrefetchingIterator(stream, prefetch=int(self.cfg.prefetch_llm_batches))
        try:
            for batch, position in stream:
                self._positions.append(position)
                self._n_steps += 1
                yield batch
        finally:
            stream.close()
            store.close()

    def _save_batch_of(self, step: int) -> Path | None:
        """Make the batch of a recent step again and save it; returns the file."""
        steps_ago = self._n_steps - step + 1
        if self.cfg.output_path is None or steps_ago >= len(self._positions):
            return None
        position = self._positions[-1 - steps_ago]
        path = Path(self.cfg.output_path) / f"bad_step_{step}.safetensors"
        store = self.activations_store.from_the_start()
        try:
            with store.model_lock:
                store.load_state(position)
                batch = next(store)
            write_tensors(path, {"activations": batch, **position})
        except UserError as error:  # no memory for a second shuffle buffer, no space
            logger.warning(f"the batch of step {step} is not saved: {error}")
            return None
        return path

    @override
    def save_checkpoint(self, checkpoint_path: Path | None) -> None:
        """Called by SAELens's trainers once they have saved their part of a checkpoint."""
        if checkpoint_path is not None:
            self._checkpoint.complete(checkpoint_path, self.cfg.to_dict(), self._positions[-1])

    def _start_wandb(self) -> None:
        cfg = self.cfg
        if cfg.logger.log_to_wandb:
            wandb.init(
                project=cfg.logger.wandb_project,
                entity=cfg.logger.wandb_entity,
                config=cfg.to_dict(),
                name=cfg.logger.run_name,
                id=cfg.logger.wandb_id,
            )

    @override
    def run_trainer_with_interruption_handling(self, trainer: Any) -> Any:
        # SAELens stops in the middle of a step and saves only the store's state, into a folder
        # that need not exist; here the step is finished, and `_rescued` writes the checkpoint
        with stop_after_this_step(trainer):
            return trainer.fit()

    @contextmanager
    def _rescued(self, trainer: RunTrainer) -> Iterator[None]:
        """Write a checkpoint of the last finished step on any error; log how to resume."""
        try:
            yield
        except BaseException as error:
            # a second Ctrl-C wants no more work, and weights after a bad step are not kept
            if isinstance(error, Exception) and not isinstance(error, BadStepError):
                self._try_checkpoint(trainer)
            self._log_hint()
            raise

    def _try_checkpoint(self, trainer: RunTrainer) -> None:
        n_samples = trainer.each[0].n_training_samples
        finished = self._n_steps * self.cfg.step_tokens == n_samples and trainer.is_between_steps
        if trainer.checkpoints is None or not finished or len(self._positions) < 2:
            return
        checkpoint = trainer.checkpoints.path / str(n_samples)
        try:
            if is_whole(checkpoint):
                trainer.checkpoints.point_to(checkpoint)
                return
            with suppress(UserError):
                trainer.log.write([])  # what the disk has not taken yet
            trainer.save_checkpoint(str(n_samples))
        except UserError as error:
            logger.warning(f"no checkpoint of the last step: {error}")

    def _log_hint(self) -> None:
        is_sweep = isinstance(self._checkpoint.trainer, MultiSAETrainer)
        with suppress(OSError):  # a disk that cannot be read either
            # the second, if the pointer to a checkpoint outside the output folder is not written
            for folder in (self.cfg.output_path, self.cfg.checkpoint_path):
                if folder is not None and newest_checkpoint(Path(folder)) is not None:
                    logger.warning(f"the run ended early: {resume_hint(Path(folder), is_sweep)}")
                    return


def load_model_of_run(cfg: RouteSAERunnerConfig) -> LanguageModel:
    """The language model that a run names, on the device that it names for it."""
    return load_model(
        cfg.model_name,
        cfg.model_class_name,
        device=cfg.llm_device or cfg.device,
        hook_names=cfg.hook_names,
        **(cfg.model_from_pretrained_kwargs or {}),
    )
