"""Training a RouteSAE: SAELens's configuration, runner and trainer, with routed layers.

1. `RouteSAERunnerConfig` is SAELens's runner configuration with the paper's defaults and two
   fields more: `routed_layers` and `hook_names`.
2. `RouteSAETrainingRunner` loads the model, resolves what the configuration leaves open against
   it, and fails there if anything does not fit.
3. SAELens's `SAETrainer` takes the steps; `RouteSAETrainer` only adds what is shown and logged.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import wandb
from sae_lens import logger
from sae_lens.config import (
    HfDataset,
    LanguageModelSAERunnerConfig,
    LoggingConfig,
    SAETrainerConfig,
)
from sae_lens.constants import ACTIVATIONS_STORE_STATE_FILENAME, SAE_CFG_FILENAME
from sae_lens.llm_sae_training_runner import (
    InterruptedException,
    LanguageModelSAETrainingRunner,
    LLMSaeEvaluator,
)
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig, TrainStepOutput
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.prefetch import PrefetchingIterator
from sae_lens.training.sae_trainer import SAETrainer
from sae_lens.training.types import DataProvider
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.hook_points import HookedRootModule
from typing_extensions import override

from sae_lens_route.activations import RoutedActivationsStore, require_memory
from sae_lens_route.models import (
    LanguageModel,
    d_model,
    default_routed_layers,
    load_model,
    n_layers,
    residual_hook_names,
)
from sae_lens_route.saes import RoutedTrainingSAE
from sae_lens_route.splice import attach

TRAIN_LOG_FILENAME = "train_log.jsonl"
UNIFORM_DRAW_FILENAME = "uniform_draw.safetensors"


def lr_schedule_steps(n_steps: int) -> tuple[int, int]:
    """Warm-up (5 %) and decay (20 %) lengths of the paper's schedule, for any run length."""
    return int(0.05 * n_steps), n_steps // 5


def routed_hook_name(last_routed_block: int) -> str:
    """Name of the hook point that the routed activation passes through."""
    return f"blocks.{last_routed_block}.hook_resid_route"


@dataclass
class RouteSAERunnerConfig(LanguageModelSAERunnerConfig[Any]):
    """SAELens's runner configuration for a RouteSAE; the defaults are the paper's.

    Every field of `LanguageModelSAERunnerConfig` keeps its meaning, except that `hook_name` is
    filled in and that these defaults differ:

    Args:
        routed_layers: Blocks whose residual streams the router chooses from, ascending. None means
            n_layers//4 - 1 ... 3*n_layers//4 - 1, which is 3 ... 11 of 16.
        hook_names: Those residual streams as the model spells them. None means found by
            `routed_layers`.
        hook_name: The routed hook; filled in, do not set.
        model_name: An official TransformerLens name, a local Hugging Face folder, or "demo".
        model_class_name: "HookedTransformer", "TransformerBridge" or "AutoModelForCausalLM".
        dataset_path: A Hub dataset, local files, or "demo".
        context_size: Tokens in a context.
        store_batch_size_prompts: Contexts in one forward pass of the language model.
        train_batch_size_tokens: Tokens in one training step. None means one forward pass's worth.
        lr_warm_up_steps: None means 5 % of the steps.
        lr_decay_steps: None means the last 20 % of the steps.
        activations_mixing_fraction: 0 hands tokens on in order, as the paper does; more keeps that
            share of a shuffle buffer.
        exclude_special_tokens: Leave BOS, EOS and padding out of training.
        checkpoint_path: None means a folder `checkpoints` in `output_path`.
    """

    routed_layers: list[int] | None = None
    hook_names: list[str] | None = None
    hook_name: str = ""
    model_name: str = "meta-llama/Llama-3.2-1B-Instruct"
    dataset_path: str = "segyges/OpenWebText2"
    context_size: int = 512
    training_tokens: int = 100_000_000
    store_batch_size_prompts: int = 64
    train_batch_size_tokens: int | None = None  # type: ignore[assignment]
    lr: float = 5e-4
    lr_warm_up_steps: int | None = None  # type: ignore[assignment]
    lr_decay_steps: int | None = None  # type: ignore[assignment]
    activations_mixing_fraction: float = 0.0
    exclude_special_tokens: bool | list[int] = True
    n_checkpoints: int = 4
    checkpoint_path: str | None = None
    verbose: bool = False
    logger: LoggingConfig = field(default_factory=lambda: LoggingConfig(log_to_wandb=False))

    def __post_init__(self) -> None:
        for name in ("training_tokens", "context_size", "store_batch_size_prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.train_batch_size_tokens is None:
            self.train_batch_size_tokens = self.store_batch_size_prompts * self.context_size
        n_steps = self.training_tokens // self.train_batch_size_tokens
        if n_steps < 1:
            raise ValueError(
                f"training_tokens={self.training_tokens}: fewer than one step's "
                f"train_batch_size_tokens={self.train_batch_size_tokens}"
            )
        if not 0 <= self.activations_mixing_fraction < 1:
            raise ValueError(
                f"activations_mixing_fraction={self.activations_mixing_fraction}: must be in [0, 1)"
            )
        warm_up, decay = lr_schedule_steps(n_steps)
        self.lr_warm_up_steps = warm_up if self.lr_warm_up_steps is None else self.lr_warm_up_steps
        self.lr_decay_steps = decay if self.lr_decay_steps is None else self.lr_decay_steps
        if self.routed_layers is not None:
            self.routed_layers = list(self.routed_layers)
            if self.routed_layers != sorted(set(self.routed_layers)):
                raise ValueError(f"routed_layers={self.routed_layers}: must ascend, each once")
        if self.model_from_pretrained_kwargs is None:
            self.model_from_pretrained_kwargs = {}  # load_model never processes weights
        if self.checkpoint_path is None and self.output_path is not None:
            self.checkpoint_path = str(Path(self.output_path) / "checkpoints")
        super().__post_init__()

    @property
    def step_tokens(self) -> int:
        """Tokens in one training step, once `train_batch_size_tokens` is filled in."""
        assert self.train_batch_size_tokens is not None
        return self.train_batch_size_tokens

    def resolve(self, model: HookedRootModule) -> None:
        """Fill in the routed layers and hook names, and hold every size against the model.

        Raises:
            ValueError: a layer or hook the model has not, or `sae.d_in` not the model's width.
        """
        if self.hook_names is None:
            layers = self.routed_layers or default_routed_layers(n_layers(model))
            self.hook_names = residual_hook_names(model, layers)
            self.routed_layers = list(layers)
        elif missing := [name for name in self.hook_names if name not in model.hook_dict]:
            raise ValueError(f"hook_names={missing}: the model has no such hook points")
        elif self.routed_layers is None or len(self.routed_layers) != len(self.hook_names):
            raise ValueError(
                f"routed_layers={self.routed_layers}: give one block index for each of the "
                f"{len(self.hook_names)} hook_names"
            )
        if self.sae.d_in != d_model(model):
            raise ValueError(
                f"sae.d_in={self.sae.d_in}: the residual stream of {self.model_name} has "
                f"{d_model(model)} dimensions"
            )
        assert self.routed_layers is not None
        self.hook_name = routed_hook_name(self.routed_layers[-1])
        self.sae = replace(self.sae, n_routed_layers=len(self.routed_layers))

    @override
    def to_sae_trainer_config(self) -> SAETrainerConfig:
        # whole steps only: SAELens would take one more, at learning rate 0
        tokens = self.total_training_steps * self.step_tokens
        return replace(super().to_sae_trainer_config(), total_training_samples=tokens)

    def memory_estimate(self) -> dict[str, int]:
        """Bytes that training takes beside the language model, by what takes them.

        Known once `resolve` has set the routed layers. `activations` is one training batch and the
        residual streams of one forward pass, `sae` its weights, gradients and Adam's two moments,
        `features` the dense latents of a step, their pre-activations and their gradients.
        """
        sae = self.sae
        width = torch.finfo(getattr(torch, self.dtype)).bits // 8
        per_token = sae.n_routed_layers * sae.d_in * width
        pass_tokens = self.store_batch_size_prompts * self.context_size
        buffer = self.n_batches_in_buffer * pass_tokens if self.activations_mixing_fraction else 0
        parameters = 2 * sae.d_in * sae.d_sae + sae.d_sae + sae.d_in * (1 + sae.n_routed_layers)
        return {
            "activations": (self.step_tokens + pass_tokens) * per_token,
            "shuffle_buffer": buffer * per_token,
            "sae": 4 * parameters * width,
            "features": 4 * self.step_tokens * sae.d_sae * width,
        }


def require_new_folder(output_path: str | Path, also_holds: str = SAE_CFG_FILENAME) -> None:
    """Raise if a folder already holds a run, so that none is ever written over."""
    if (Path(output_path) / also_holds).exists():
        raise ValueError(
            f"output_path={str(output_path)!r}: already holds a run ({also_holds}); give another "
            "folder or remove it"
        )


@torch.no_grad()
def step_record(trainer: SAETrainer[Any, Any], output: TrainStepOutput) -> dict[str, Any]:
    """What is logged of a step: loss, every loss and metric, l0, dead features, learning rate.

    Raises:
        ValueError: the loss is NaN.
    """
    log = trainer.build_train_step_log_dict(output, trainer.n_training_samples)
    short = {key.split("/", 1)[1]: value for key, value in log.items()}
    loss = short.pop("overall_loss")
    if loss != loss:
        raise ValueError(
            f"the loss is NaN after step {trainer.n_training_steps}: lower lr={trainer.cfg.lr}, or "
            "look for NaN in the model's activations; earlier checkpoints are kept"
        )
    return {
        "step": trainer.n_training_steps,
        "tokens": trainer.n_training_samples,
        "loss": loss,
        **{k: v for k, v in short.items() if k != "n_training_samples" and "legacy" not in k},
    }


def save_uniform_draw(sae: TrainingSAE[Any], checkpoint_path: str | Path) -> None:
    """Write down where uniform routing's generator stands, if there is one."""
    generator: torch.Generator | None = getattr(sae, "_generator", None)
    if generator is not None:
        path = Path(checkpoint_path) / UNIFORM_DRAW_FILENAME
        save_file({"generator": generator.get_state()}, path)


def load_uniform_draw(sae: TrainingSAE[Any], checkpoint_path: str | Path) -> None:
    """Let uniform routing go on drawing where a checkpoint stopped."""
    path = Path(checkpoint_path) / UNIFORM_DRAW_FILENAME
    if isinstance(sae, RoutedTrainingSAE) and path.exists():
        generator = sae._uniform_generator(sae.device)
        if generator is not None:
            generator.set_state(load_file(path)["generator"])


class RouteSAETrainer(SAETrainer[Any, Any]):
    """SAELens's trainer, which also shows and writes down how the routing goes.

    Reads numbers off the device only every `log_every` steps, and writes each such step as one
    line of JSON: step, tokens, loss, every loss and metric, l0, dead features, learning rate,
    tokens per second.
    """

    def __init__(
        self, *args: Any, log_file: Path | None, log_every: int, layer_names: list[str], **kw: Any
    ) -> None:
        super().__init__(*args, **kw)
        self.log_file, self.log_every, self.layer_names = log_file, log_every, layer_names
        self._since, self._samples = time.perf_counter(), 0
        self.stop_requested = False

    @override
    def save_trainer_state(self, checkpoint_path: Path) -> None:
        super().save_trainer_state(checkpoint_path)
        save_uniform_draw(self.sae, checkpoint_path)

    @override
    def load_trainer_state(self, checkpoint_path: Path | str) -> None:
        super().load_trainer_state(checkpoint_path)
        load_uniform_draw(self.sae, checkpoint_path)
        # SAELens saves before it counts the step, so its number can be one short
        self.n_training_steps = self.n_training_samples // self.cfg.train_batch_size_samples
        passed = self.n_training_samples
        self.checkpoint_thresholds = [t for t in self.checkpoint_thresholds if t >= passed]
        self._samples = passed

    @override
    def _update_pbar(
        self, step_output: TrainStepOutput, pbar: tqdm, update_interval: int = 100
    ) -> None:
        """Called by `fit` at the end of every step."""
        self._show_and_log(step_output, pbar)
        if self.stop_requested:
            raise InterruptedException

    def _show_and_log(self, step_output: TrainStepOutput, pbar: tqdm) -> None:
        is_last = self.n_training_samples >= self.cfg.total_training_samples
        if self.n_training_steps % self.log_every != 0 and not is_last:
            return
        record = self._record(step_output)
        if self.log_file is not None:
            with self.log_file.open("a") as file:
                file.write(json.dumps(record) + "\n")
        shares = "/".join(
            f"{100 * record[f'route_share/{i}']:.0f}" for i in range(len(self.layer_names))
        )
        pbar.set_description("Training RouteSAE")
        pbar.set_postfix_str(
            f"loss {record['loss']:.4f}  L0 {record['l0']:.1f}  "
            f"blocks {self.layer_names[0]}-{self.layer_names[-1]}: {shares} %"
        )
        pbar.update(self.n_training_samples - pbar.n)

    def _record(self, output: TrainStepOutput) -> dict[str, Any]:
        now, n = time.perf_counter(), self.n_training_samples
        rate = (n - self._samples) / max(now - self._since, 1e-9)
        self._since, self._samples = now, n
        return {**step_record(self, output), "tokens_per_second": rate}


class RoutedEvaluator(LLMSaeEvaluator[Any]):
    """SAELens's evaluation during training (for W&B), with the routed hook there while it runs."""

    @override
    def __call__(self, sae: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        with attach(self.model, sae):
            return super().__call__(sae, *args, **kwargs)


class RouteSAETrainingRunner(LanguageModelSAETrainingRunner):
    """SAELens's training runner for RouteSAEs: same files, same logging.

    Args:
        cfg: What to train; resolved against the model here.
        override_dataset: A dataset instead of the one `cfg.dataset_path` names.
        override_model: A loaded model instead of `cfg.model_name`.
        override_sae: An SAE to train on, instead of a new one.

    Raises:
        ValueError: anything about the configuration, the model or the data that would stop the
            run later; the message names the field.
    """

    cfg: RouteSAERunnerConfig
    activations_store: RoutedActivationsStore

    def __init__(
        self,
        cfg: RouteSAERunnerConfig,
        override_dataset: HfDataset | None = None,
        override_model: HookedRootModule | None = None,
        override_sae: TrainingSAE[Any] | None = None,
    ) -> None:
        self.cfg = cfg
        if cfg.output_path is not None and cfg.resume_from_checkpoint is None:
            require_new_folder(cfg.output_path)
        self.model = self._load_model() if override_model is None else override_model
        cfg.resolve(self.model)
        self._check_size()
        self._compile_llm_if_needed()
        self.activations_store = RoutedActivationsStore.from_config(
            self.model, cfg, override_dataset=override_dataset
        )
        torch.manual_seed(cfg.seed)
        self.sae = self._new_sae() if override_sae is None else override_sae
        self.sae.to(cfg.device)
        self.evaluator = RoutedEvaluator(
            model=self.model,
            activations_store=self.activations_store,
            eval_batch_size_prompts=cfg.eval_batch_size_prompts,
            n_eval_batches=cfg.n_eval_batches,
            model_kwargs=cfg.model_kwargs,
        )

    def _check_size(self) -> None:
        """Raise if what is to be trained does not fit in memory."""
        cfg = self.cfg
        need = sum(cfg.memory_estimate().values())
        require_memory(need, cfg.device, "train_batch_size_tokens", cfg.train_batch_size_tokens)

    def _load_model(self) -> LanguageModel:
        return load_model(
            self.cfg.model_name,
            self.cfg.model_class_name,
            device=self.cfg.llm_device or self.cfg.device,
            hook_names=self.cfg.hook_names,
            **(self.cfg.model_from_pretrained_kwargs or {}),
        )

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
        self.sae.cfg.metadata.routed_layers = self.cfg.routed_layers

    @override
    def run(self) -> TrainingSAE[Any]:
        """Train, save to `output_path`, and return the trained SAE.

        Ctrl-C and SIGTERM write a checkpoint first.
        """
        cfg = self.cfg
        self._set_sae_metadata()
        if cfg.output_path is not None:
            Path(cfg.output_path).mkdir(parents=True, exist_ok=True)
        self._start_wandb()
        with closing(self._stream()) as batches:
            trainer = self._trainer(batches)
            if cfg.resume_from_checkpoint is not None:
                trainer.load_trainer_state(cfg.resume_from_checkpoint)
                self.sae.load_weights_from_checkpoint(cfg.resume_from_checkpoint)
                self.activations_store.load_from_checkpoint(cfg.resume_from_checkpoint)
            self._compile_sae_if_needed()
            sae = self.run_trainer_with_interruption_handling(trainer)
        if sae.cfg.decoder_norm_interval > 0:
            sae.normalize_decoder()
        if cfg.output_path is not None:
            self.save_final_sae(sae, cfg.output_path, trainer.log_feature_sparsity)
        if cfg.logger.log_to_wandb:
            wandb.finish()
        return sae

    def _stream(self) -> Generator[Tensor, None, None]:
        """Every batch, read ahead if that is asked for.

        Remembers the place in the text that the last batch ended at, for `save_checkpoint`: the
        store itself may have read on.
        """
        store = self.activations_store
        stream = ((batch, store.state_dict()) for batch in store)
        if self.cfg.prefetch_llm_batches:
            stream = PrefetchingIterator(stream, prefetch=int(self.cfg.prefetch_llm_batches))
        try:
            for batch, self._place in stream:
                yield batch
        finally:
            stream.close()

    @override
    def save_checkpoint(self, checkpoint_path: Path | None) -> None:
        """What SAELens's trainers do not save: the configuration and the place in the text."""
        super().save_checkpoint(checkpoint_path)
        if checkpoint_path is not None:
            save_file(self._place, checkpoint_path / ACTIVATIONS_STORE_STATE_FILENAME)

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

    def _trainer(self, provider: DataProvider) -> RouteSAETrainer:
        cfg = self.cfg
        log_file = Path(cfg.output_path) / TRAIN_LOG_FILENAME if cfg.output_path else None
        return RouteSAETrainer(
            cfg=cfg.to_sae_trainer_config(),
            sae=self.sae,
            data_provider=provider,
            evaluator=self.evaluator,
            save_checkpoint_fn=self.save_checkpoint,
            log_file=log_file,
            log_every=cfg.logger.wandb_log_frequency,
            layer_names=[str(layer) for layer in cfg.routed_layers or ()],
        )

    @override
    def run_trainer_with_interruption_handling(
        self, trainer: SAETrainer[Any, Any] | MultiSAETrainer
    ) -> Any:
        # SAELens stops in the middle of a step and saves only the store's state, into a folder
        # that need not exist; here the step is finished and the checkpoint is whole
        try:
            with stop_after_this_step(trainer):
                return trainer.fit()
        except InterruptedException:
            if self.cfg.checkpoint_path is not None:
                name = str(trainer.n_training_samples)
                trainer.save_checkpoint(checkpoint_name=name)
                path = Path(self.cfg.checkpoint_path) / name
                logger.warning(f"interrupted: go on with resume_from_checkpoint={path}")
            raise


@contextmanager
def stop_after_this_step(trainer: Any) -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into a stop at the end of the step; the second one acts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {sig: signal.getsignal(sig) for sig in signals}

    def request_stop(*_: Any) -> None:
        trainer.stop_requested = True
        for sig in signals:
            signal.signal(sig, before[sig])

    for sig in signals:
        signal.signal(sig, request_stop)
    try:
        yield
    finally:
        for sig in signals:
            signal.signal(sig, before[sig])
