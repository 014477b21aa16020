"""Configuration of a training run, from Python, a YAML/JSON file or flat values.

`RouteSAERunnerConfig` is SAELens's runner configuration with the paper's defaults and two more
fields: `routed_blocks` and `hook_names`. `runner_config` builds one from flat values: fields of the
run, of the SAE's training configuration and of the logger in one mapping, as in the files of
`examples/configs` and the options of `sae-lens-route train`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from sae_lens.config import LanguageModelSAERunnerConfig, LoggingConfig, SAETrainerConfig
from sae_lens.constants import DTYPE_MAP
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import TrainingSAEConfig
from transformer_lens.hook_points import HookedRootModule
from typing_extensions import override

import sae_lens_route.saes  # noqa: F401  (registers the architectures)
from sae_lens_route.config_fields import (
    FILLED_IN,
    ConfigField,
    did_you_mean,
    fields_of,
    read_config_file,
)
from sae_lens_route.errors import UserError
from sae_lens_route.models.kinds import (
    context_length,
    d_model,
    default_routed_blocks,
    n_layers,
    residual_hook_names,
)
from sae_lens_route.models.load import model_width
from sae_lens_route.saes.crosscoder import CrosscoderTrainingConfigMixin
from sae_lens_route.saes.multi_layer import MultiLayerTopKTrainingConfig
from sae_lens_route.saes.routed_config import RoutedTrainingConfigMixin


def lr_schedule_steps(n_steps: int) -> tuple[int, int]:
    """Warm-up (5 %) and decay (20 %) lengths of the paper's schedule, for any run length."""
    return int(0.05 * n_steps), n_steps // 5


def routed_hook_name(last_block: int) -> str:
    """Name of the hook point that the routed activation passes through."""
    return f"blocks.{last_block}.route.hook_resid_post"


def crosscoder_hook_name(last_block: int) -> str:
    """Name of the hook point that a crosscoder's input passes through."""
    return f"blocks.{last_block}.stack.hook_resid_post"


_LOWEST = {
    0: ("n_checkpoints", "prefetch_llm_batches"),
    1: (
        "training_tokens",
        "store_batch_size_prompts",
        "train_batch_size_tokens",
        "n_batches_in_buffer",
        "feature_sampling_window",
        "n_eval_batches",
        "keep_checkpoints",
        "wandb_log_frequency",
        "eval_every_n_wandb_logs",
    ),
    2: ("context_size",),  # of a single token there is only BOS
}
"""Fields of the run and the logger by the lowest value they take."""


@dataclass
class RouteSAERunnerConfig(LanguageModelSAERunnerConfig[Any]):
    """SAELens's runner configuration for a RouteSAE; the defaults are the paper's.

    Every field of `LanguageModelSAERunnerConfig` keeps its meaning, except that `hook_name` is
    filled in. New fields, and those with other defaults:

    Args:
        routed_blocks: Blocks whose residual streams the router chooses from, ascending. None means
            n_layers//4 - 1 ... 3*n_layers//4 - 1, which is 3 ... 11 of 16.
        hook_names: Names of those residual streams in the model. None derives them from
            `routed_blocks`.
        hook_name: The routed hook; filled in, do not set.
        model_name: An official TransformerLens name, a local Hugging Face folder, or "demo".
        model_class_name: "HookedTransformer", "TransformerBridge" or "AutoModelForCausalLM".
        dataset_path: A Hub dataset, local files, or "demo".
        context_size: Tokens in a context.
        store_batch_size_prompts: Contexts in one forward pass of the language model.
        train_batch_size_tokens: Tokens in one training step. None means one forward pass's worth.
        lr_warm_up_steps: None means 5 % of the steps.
        lr_decay_steps: None means the last 20 % of the steps.
        activations_mixing_fraction: 0 keeps the tokens in order, as the paper does; otherwise the
            share of a shuffle buffer that stays in it.
        exclude_special_tokens: Exclude BOS, EOS and padding, or a list of token ids, from training.
        checkpoint_path: None means a folder `checkpoints` in `output_path`.
        resume_from_checkpoint: A checkpoint, or the folder of a run, which means its newest one.
        keep_checkpoints: How many of the newest checkpoints are kept; None keeps all.
        on_bad_step: What happens when a loss or an update is not finite: "stop" ends the run, and
            "skip" leaves that update out, for which it keeps a copy of weights and moments.
        cache_activations: A folder where activations are kept, so that the language model computes
            them once: what is there is read, and the rest is written. A run that finds all of its
            activations there does not load the model.
        cache_dtype: How they are kept: "exact", or "int8", a byte per number and a scale per token
            and block.
        extend_run: With `resume_from_checkpoint`: train up to `training_tokens`, which is more than
            the run had. The learning rate stays at `lr` until the last 20 % of the added steps.
        extended_from: Tokens after which the run was extended last; filled in.
    """

    routed_blocks: list[int] | None = None
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
    keep_checkpoints: int | None = None
    on_bad_step: Literal["stop", "skip"] = "stop"
    cache_activations: str | None = None
    cache_dtype: Literal["exact", "int8"] = "exact"
    extend_run: bool = False
    extended_from: int | None = None
    verbose: bool = False
    logger: LoggingConfig = field(default_factory=lambda: LoggingConfig(log_to_wandb=False))

    def __post_init__(self) -> None:
        self._check_ranges()
        if self.dtype not in DTYPE_MAP:
            raise UserError(f"dtype={self.dtype!r}: must be one of {', '.join(DTYPE_MAP)}")
        if self.train_batch_size_tokens is None:
            self.train_batch_size_tokens = self.store_batch_size_prompts * self.context_size
        n_steps = self.training_tokens // self.train_batch_size_tokens
        if n_steps < 1:
            raise UserError(
                f"training_tokens={self.training_tokens}: fewer than one step's "
                f"train_batch_size_tokens={self.train_batch_size_tokens}"
            )
        warm_up, decay = lr_schedule_steps(n_steps)
        self.lr_warm_up_steps = warm_up if self.lr_warm_up_steps is None else self.lr_warm_up_steps
        self.lr_decay_steps = decay if self.lr_decay_steps is None else self.lr_decay_steps
        if self.routed_blocks is not None:
            self.routed_blocks = list(self.routed_blocks)
            if not self.routed_blocks or self.routed_blocks != sorted(set(self.routed_blocks)):
                raise UserError(
                    f"routed_blocks={self.routed_blocks}: must ascend without duplicates and name "
                    "at least one block"
                )
        if self.model_from_pretrained_kwargs is None:
            self.model_from_pretrained_kwargs = {}  # load_model never processes weights
        if self.checkpoint_path is None and self.output_path is not None:
            self.checkpoint_path = str(Path(self.output_path) / "checkpoints")
        super().__post_init__()

    def _check_ranges(self) -> None:
        """Raise if a number is outside its range."""
        for lowest, names in _LOWEST.items():
            for name in names:
                value = getattr(self.logger if hasattr(self.logger, name) else self, name)
                if value is not None and value < lowest:
                    raise UserError(f"{name}={value}: must be at least {lowest}")
        if not 0 <= self.activations_mixing_fraction < 1:
            raise UserError(
                f"activations_mixing_fraction={self.activations_mixing_fraction}: must be in [0, 1)"
            )
        if self.on_bad_step not in ("stop", "skip"):
            raise UserError(f"on_bad_step={self.on_bad_step!r}: must be 'stop' or 'skip'")
        if self.cache_dtype not in ("exact", "int8"):
            raise UserError(f"cache_dtype={self.cache_dtype!r}: must be 'exact' or 'int8'")
        if self.use_cached_activations or self.cached_activations_path is not None:
            raise UserError(
                "use_cached_activations, cached_activations_path: SAELens's cache holds one block; "
                "name a folder in cache_activations"
            )

    @classmethod
    def from_file(cls, path: str | Path, **overrides: Any) -> RouteSAERunnerConfig:
        """The run of a YAML or JSON file; keyword arguments override its values.

        Raises:
            UserError: The file cannot be read, an unknown field, or a value its field rejects.
        """
        return runner_config({**read_config_file(path), **overrides})

    def extend_from(self, tokens: int) -> None:
        """Set the schedule of a run that is extended after `tokens`: constant, then a decay.

        Raises:
            UserError: `training_tokens` adds no step.
        """
        added = self.total_training_steps - tokens // self.step_tokens
        if added < 1:
            raise UserError(
                f"training_tokens={self.training_tokens}: the checkpoint has {tokens:,} tokens "
                f"already; an extended run needs at least {tokens + self.step_tokens:,}"
            )
        self.extended_from = tokens
        self.lr_warm_up_steps, self.lr_decay_steps = 0, lr_schedule_steps(added)[1]
        self.lr_scheduler_name = "constant"

    @property
    def step_tokens(self) -> int:
        """Tokens in one training step, once `train_batch_size_tokens` is filled in."""
        assert self.train_batch_size_tokens is not None
        return self.train_batch_size_tokens

    def resolve(self, model: HookedRootModule) -> None:
        """Fill in the routed blocks and hook names, and check every size against the model.

        Raises:
            UserError: The model lacks a block or hook, or `sae.d_in` differs from its width (from L
                times its width, for a crosscoder).
        """
        if self.hook_names is None:
            blocks = self.routed_blocks or default_routed_blocks(n_layers(model))
            self.hook_names = residual_hook_names(model, blocks)
            self.routed_blocks = list(blocks)
        elif missing := [name for name in self.hook_names if name not in model.hook_dict]:
            raise UserError(f"hook_names={missing}: the model has no such hook points")
        elif self.routed_blocks is None or len(self.routed_blocks) != len(self.hook_names):
            raise UserError(
                f"routed_blocks={self.routed_blocks}: give one block index for each of the "
                f"{len(self.hook_names)} hook_names"
            )
        longest = context_length(model)
        if longest is not None and self.context_size > longest:
            raise UserError(
                f"context_size={self.context_size}: {self.model_name} reads at most {longest} "
                "tokens at once"
            )
        if self.d_model != d_model(model):
            raise UserError(
                f"sae.d_in={self.sae.d_in}: the residual stream of {self.model_name} has "
                f"{d_model(model)} dimensions"
            )
        self._set_blocks()

    def resolve_without_model(self, n_layers: int, width: int, names: Mapping[int, str]) -> bool:
        """As `resolve`, from the hook names of some blocks; False if they are not enough.

        Args:
            n_layers: Blocks of the model.
            width: Dimensions of its residual stream.
            names: Hook names of the blocks that are known.
        """
        blocks = self.routed_blocks or default_routed_blocks(n_layers)
        found = [names[block] for block in blocks if block in names]
        complete = len(found) == len(blocks) and self.hook_names in (None, found)
        if self.d_model != width or not complete:
            return False
        self.routed_blocks, self.hook_names = list(blocks), found
        self._set_blocks()
        return True

    def _set_blocks(self) -> None:
        """Fill in what follows from the routed blocks."""
        assert self.routed_blocks is not None
        n_blocks = len(self.routed_blocks)
        if isinstance(self.sae, CrosscoderTrainingConfigMixin):
            self.hook_name = crosscoder_hook_name(self.routed_blocks[-1])
            self.sae = replace(self.sae, n_routed_layers=n_blocks, d_in=n_blocks * self.d_model)
        else:
            self.hook_name = routed_hook_name(self.routed_blocks[-1])
            self.sae = replace(self.sae, n_routed_layers=n_blocks)

    @property
    def d_model(self) -> int:
        """Width of one residual stream; the `sae.d_in` of a crosscoder is L times that."""
        sae = self.sae
        return sae.d_model if isinstance(sae, CrosscoderTrainingConfigMixin) else sae.d_in

    @override
    def to_sae_trainer_config(self) -> SAETrainerConfig:
        # whole steps only: SAELens would take one more, at learning rate 0
        tokens = self.total_training_steps * self.step_tokens
        return replace(super().to_sae_trainer_config(), total_training_samples=tokens)

    def memory_estimate(self) -> dict[str, int]:
        """Memory in bytes that training needs by component, excluding the language model.

        Valid once `resolve` has set the number of blocks. `activations` is one training batch and
        the residual streams of one forward pass; `sae` its weights, gradients and Adam's two
        moments; `features` the dense latents of a step, their pre-activations and their gradients.
        """
        sae = self.sae
        width = DTYPE_MAP[self.dtype].itemsize
        per_token = sae.n_routed_layers * self.d_model * width
        # a multi-layer SAE encodes every block of every token
        rows = sae.n_routed_layers if isinstance(sae, MultiLayerTopKTrainingConfig) else 1
        pass_tokens = self.store_batch_size_prompts * self.context_size
        buffer = self.n_batches_in_buffer * pass_tokens if self.activations_mixing_fraction else 0
        parameters = 2 * sae.d_in * sae.d_sae + sae.d_sae + sae.d_in * (1 + sae.n_routed_layers)
        return {
            "activations": (self.step_tokens + pass_tokens) * per_token,
            "shuffle_buffer": buffer * per_token,
            "sae": (7 if self.on_bad_step == "skip" else 4) * parameters * width,
            "features": 4 * self.step_tokens * rows * sae.d_sae * width,
        }


def trainable_architectures() -> dict[str, type[TrainingSAEConfig]]:
    """Training configurations of RouteSAEs and crosscoders by architecture, the paper's first."""
    mixins = (RoutedTrainingConfigMixin, CrosscoderTrainingConfigMixin)
    return {
        name: config
        for name, (_, config) in SAE_TRAINING_CLASS_REGISTRY.items()
        if issubclass(config, mixins)
    }


def config_fields(architecture: str = "route_topk") -> dict[str, dict[str, ConfigField]]:
    """Fields by name of the three parts of a run: "runner", "sae" and "logger".

    Raises:
        UserError: An architecture that the runner does not train.
    """
    architectures = trainable_architectures()
    if architecture not in architectures:
        raise UserError(f"architecture={architecture!r}: must be one of {', '.join(architectures)}")
    runner = fields_of(RouteSAERunnerConfig)
    sae = fields_of(architectures[architecture])
    return {
        "runner": runner,
        "sae": {name: each for name, each in sae.items() if name not in runner},
        "logger": fields_of(LoggingConfig),
    }


def runner_config(values: Mapping[str, Any]) -> RouteSAERunnerConfig:
    """The run that flat field values describe; fields without a value have their default.

    Args:
        values: Fields of the run, the logger and the training configuration of `architecture`
            (default: "route_topk"). Text is read as YAML where the field takes no text. `d_in` is
            the model's width, read from the model's configuration by default; `d_sae` is 8 times
            that by default.

    Raises:
        UserError: An unknown field, or a value its field rejects.
    """
    architecture = values.get("architecture", "route_topk")
    fields = config_fields(architecture)
    parts: dict[str, dict[str, Any]] = {"runner": {}, "sae": {}, "logger": {"log_to_wandb": False}}
    for name, value in values.items():
        if name == "architecture":
            continue
        part = next((part for part in fields if name in fields[part]), None)
        if part is None:
            raise UserError(_unknown_field(name, architecture))
        parts[part][name] = fields[part][name].read(value)
    runner, sae = parts["runner"], parts["sae"]
    sae |= {shared: runner[shared] for shared in ("device", "dtype") if shared in runner}
    if "d_in" not in sae:
        model_name = runner.get("model_name", RouteSAERunnerConfig.model_name)
        kind = runner.get("model_class_name", RouteSAERunnerConfig.model_class_name)
        sae["d_in"] = model_width(model_name, kind)
    sae.setdefault("d_sae", 8 * sae["d_in"])
    try:
        return RouteSAERunnerConfig(
            sae=training_config(architecture, sae),
            logger=LoggingConfig(**parts["logger"]),
            **runner,
        )
    except ValueError as error:  # SAELens's own checks
        raise UserError(str(error)) from error


def training_config(architecture: str, values: Mapping[str, Any]) -> TrainingSAEConfig:
    """A training configuration whose number of blocks is provisional until the model is known."""
    config_class = SAE_TRAINING_CLASS_REGISTRY[architecture][1]
    if issubclass(config_class, CrosscoderTrainingConfigMixin):
        return config_class(**{**values, "n_routed_layers": 1})
    if values.get("route_shares") is not None:
        values = {**values, "n_routed_layers": len(values["route_shares"])}
    return config_class(**values)


def _unknown_field(name: str, architecture: str) -> str:
    if name in FILLED_IN:
        return f"{name}: is filled in; leave it out"
    if any(name in config_fields(other)["sae"] for other in trainable_architectures()):
        return f"{name}: architecture={architecture!r} has no such field"
    known = [name for part in config_fields(architecture).values() for name in part]
    hint = did_you_mean(name, ["architecture", *known])
    return f"unknown field {name!r}{hint} (`sae-lens-route train --help` lists the fields)"
