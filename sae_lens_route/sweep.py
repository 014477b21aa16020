"""Many dictionaries on one stream of activations: the language model runs once for all of them.

1. A `SweepEntry` names what to train: a SAELens training configuration, the blocks it reads and its
   seed. RouteSAEs read all routed blocks or some of them, crosscoders too; a plain SAELens
   configuration reads n(x) of one block and is saved as the RouteSAE with that one routed block.
2. `SweepRunner` is `RouteSAETrainingRunner` with SAELens's `MultiSAETrainer`: one `SAETrainer` for
   each entry, with its own optimizer, schedules and statistics, all given views of one batch. On
   the CPU, with the same seed, an entry ends with the bits it would have had in a run of its own.
3. `evaluate_sweep` reads held-out text once, with one clean forward pass for all of them, and
   `SweepResult` is the table: one row for each entry.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import torch
import wandb
from jaxtyping import Float
from sae_lens import SAE
from sae_lens.config import HfDataset
from sae_lens.constants import ACTIVATIONS_STORE_STATE_FILENAME, SAE_CFG_FILENAME
from sae_lens.llm_sae_training_runner import InterruptedException
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig, TrainStepOutput
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.util import str_to_dtype
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.hook_points import HookedRootModule
from typing_extensions import override

from sae_lens_route.activations import require_memory
from sae_lens_route.baselines import MultiLayerTopKTrainingConfig, StackedTrainingConfig
from sae_lens_route.evals import Evaluation, evaluate_all
from sae_lens_route.models import LanguageModel
from sae_lens_route.router import normalize
from sae_lens_route.runner import (
    TRAIN_LOG_FILENAME,
    RouteSAERunnerConfig,
    RouteSAETrainingRunner,
    load_uniform_draw,
    require_new_folder,
    save_uniform_draw,
    step_record,
)
from sae_lens_route.saes import RoutedTrainingConfig, RoutedTrainingSAE, as_routed, to_inference

SPARSITY_FIELDS = ("k", "l1_coefficient", "l0_coefficient", "target_l0")
"""What sets how many features are active, depending on the architecture."""


@dataclass(frozen=True)
class SweepEntry:
    """One dictionary of a sweep.

    Args:
        sae: What to train. `d_in` is the model's width; the number of layers is filled in.
        blocks: Routed blocks that it reads, ascending; None means all of them. A SAELens
            configuration without a router needs exactly one.
        seed: Seed of its weights.
        label: What it is called in tables and figures; entries that differ only in seed and
            sparsity share it.
    """

    sae: TrainingSAEConfig
    blocks: list[int] | None = None
    seed: int = 42
    label: str = ""


def expand_runs(
    runs: Mapping[str, Mapping[str, Any]], d_in: int, seeds: Sequence[int]
) -> dict[str, SweepEntry]:
    """Entries of a sweep from plain settings, one for each seed and sparsity.

    Args:
        runs: For each label the fields of its training configuration, besides `architecture`
            (a SAELens training architecture, "route_topk" when left out) and `blocks`. Where k, or
            another of `SPARSITY_FIELDS`, is a list there is an entry for each of its values.
        d_in: Width of the model.
        seeds: Seeds of the weights.

    Raises:
        ValueError: an unknown architecture or field, or a value it does not take, with the label.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds={list(seeds)}: give at least one, each once")
    entries: dict[str, SweepEntry] = {}
    for label, settings in runs.items():
        try:
            expanded = _expand(label, dict(settings or {}), d_in)
        except (TypeError, ValueError) as error:
            raise ValueError(f"run {label!r} of the sweep: {error}") from error
        for name, entry in expanded.items():
            for seed in seeds:
                full_name = f"{name} seed={seed}" if len(seeds) > 1 else name
                if full_name in entries:
                    raise ValueError(
                        f"run {label!r} of the sweep: there is another {full_name!r}; rename one"
                    )
                entries[full_name] = replace(entry, seed=seed)
    return entries


def _expand(label: str, settings: dict[str, Any], d_in: int) -> dict[str, SweepEntry]:
    """A run's entries by name, one for each sparsity; their seed is still to be set."""
    blocks = settings.pop("blocks", None)
    if blocks is not None and not (
        isinstance(blocks, list) and all(type(b) is int for b in blocks)
    ):
        raise ValueError(f"blocks={blocks!r}: must be a list of blocks")
    listed = [name for name in SPARSITY_FIELDS if isinstance(settings.get(name), list)]
    if not listed:
        return {label: SweepEntry(_sae_config(settings, d_in), blocks, label=label)}
    if len(listed) > 1:
        raise ValueError(f"{' and '.join(listed)} are lists: only one can be")
    field, values = listed[0], settings[listed[0]]
    if not values or len(set(values)) < len(values):
        raise ValueError(f"{field}={values}: give at least one value, each once")
    return {
        label if len(values) == 1 else f"{label} {field}={value}": SweepEntry(
            _sae_config({**settings, field: value}, d_in), blocks, label=label
        )
        for value in values
    }


_FILLED_IN = {"d_in", "n_routed_layers", "metadata", "sae_lens_version"}
_FILLED_IN |= {"sae_lens_training_version"}


def _sae_config(settings: Mapping[str, Any], d_in: int) -> TrainingSAEConfig:
    values = dict(settings)
    architecture = values.pop("architecture", "route_topk")
    if architecture not in SAE_TRAINING_CLASS_REGISTRY:
        known = ", ".join(sorted(SAE_TRAINING_CLASS_REGISTRY))
        raise ValueError(f"architecture={architecture!r}: must be one of {known}")
    config_class = SAE_TRAINING_CLASS_REGISTRY[architecture][1]
    names = {field.name for field in fields(config_class)} - _FILLED_IN
    for name in values:
        if name in _FILLED_IN:
            raise ValueError(f"{name}={values[name]!r}: is filled in; leave it out")
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(sorted(names))}"
            raise ValueError(f"unknown field {name!r} of {architecture}; {hint}")
    if "d_sae" not in values:
        raise ValueError("d_sae is missing: give the number of features")
    # both numbers of layers are provisional: the blocks are known only with the model
    if issubclass(config_class, StackedTrainingConfig):
        values["n_routed_layers"] = 1
    elif values.get("layer_shares") is not None:
        values["n_routed_layers"] = len(values["layer_shares"])
    return config_class(d_in=d_in, **values)


class SweepRunner(RouteSAETrainingRunner):
    """Trains every entry on one stream of activations and saves each in a folder of its own.

    Args:
        cfg: Model, text, tokens, batch sizes, schedule and output; `cfg.sae` gives only the width.
            The stream, and the order of a shuffle buffer, come from `cfg.seed`.
        entries: What to train, by name; a name is also the name of its folder in `output_path`.
        override_dataset: A dataset instead of the one `cfg.dataset_path` names.
        override_model: A loaded model instead of `cfg.model_name`.

    Raises:
        ValueError: anything that would stop the sweep later, named with its entry.
    """

    def __init__(
        self,
        cfg: RouteSAERunnerConfig,
        entries: Mapping[str, SweepEntry],
        override_dataset: HfDataset | None = None,
        override_model: HookedRootModule | None = None,
    ) -> None:
        _check_entries(cfg, entries)
        self.entries = dict(entries)
        self.saes: dict[str, TrainingSAE[Any]] = {}
        if cfg.routed_layers is not None:  # otherwise known with the model
            self._find_sources(cfg)
        super().__init__(cfg, override_dataset, override_model)

    def _find_sources(self, cfg: RouteSAERunnerConfig) -> None:
        routed_blocks = list(cfg.routed_layers or ())
        self._sources = {
            name: _Source.of(name, entry, routed_blocks) for name, entry in self.entries.items()
        }
        self._configs = {
            name: source.sized(name, self.entries[name].sae, cfg.sae.d_in)
            for name, source in self._sources.items()
        }
        if cfg.resume_from_checkpoint is not None:
            _check_checkpoint(Path(cfg.resume_from_checkpoint), self._configs, self._sources)

    @override
    def _check_size(self) -> None:
        """Also holds the entries against the model's blocks, now that they are known."""
        self._find_sources(self.cfg)
        parts = self.memory_estimate()
        need = sum(parts.values())
        if parts["saes"] > need / 2:
            require_memory(need, self.cfg.device, "entries", len(self.entries))
        tokens = self.cfg.train_batch_size_tokens
        require_memory(need, self.cfg.device, "train_batch_size_tokens", tokens)

    def memory_estimate(self) -> dict[str, int]:
        """Bytes that training takes beside the language model, by what takes them.

        As `RouteSAERunnerConfig.memory_estimate`, for all entries: `saes` adds up their weights,
        gradients and Adam's two moments. SAELens keeps what every entry made of a batch until the
        step is over, so `features` adds up too, but for the gradients of one entry at a time.
        """
        cfg = self.cfg
        alone = cfg.memory_estimate()
        saes, kept, gradients, copies = 0, 0, 0, {}
        for name, sae in self._configs.items():
            source = self._sources[name]
            width = str_to_dtype(sae.dtype).itemsize
            saes += 4 * width * (2 * sae.d_in * sae.d_sae + sae.d_sae + 2 * sae.d_in)
            encodes_all = isinstance(sae, MultiLayerTopKTrainingConfig)
            rows = cfg.step_tokens * (len(source.rows) if encodes_all else 1)
            kept += 2 * width * rows * (sae.d_in + sae.d_sae)
            gradients = max(gradients, 2 * width * rows * (sae.d_in + sae.d_sae))
            copies[source.key] = 0 if source.is_view else len(source.rows) * cfg.sae.d_in * width
        return {
            "activations": alone["activations"] + cfg.step_tokens * sum(copies.values()),
            "shuffle_buffer": alone["shuffle_buffer"],
            "saes": saes,
            "features": kept + gradients,
        }

    @override
    def _new_sae(self) -> TrainingSAE[Any]:
        """All entries' dictionaries; gives back the last, as SAELens's runner holds one."""
        for name, entry in self.entries.items():
            torch.manual_seed(entry.seed)
            sae = TrainingSAE.from_dict(self._configs[name].to_dict()).to(self.cfg.device)
            self._describe(sae, self._sources[name])
            self.saes[name] = sae
        return self.sae

    def _describe(self, sae: TrainingSAE[Any], source: _Source) -> None:
        """The metadata a run of its own would have written."""
        self.sae = sae
        self._set_sae_metadata()
        names = dict(zip(self.cfg.routed_layers or (), self.cfg.hook_names or (), strict=True))
        metadata = sae.cfg.metadata
        metadata.routed_layers = list(source.blocks)
        metadata.hook_names = [names[block] for block in source.blocks]
        kind = "stack" if source.kind == "stack" else "route"
        metadata.hook_name = f"blocks.{source.blocks[-1]}.hook_resid_{kind}"

    @override
    def run(self) -> dict[str, SAE[Any]]:  # type: ignore[override]
        """Train all entries; gives back the SAEs for inference, by name.

        Ctrl-C and SIGTERM write a checkpoint first; `cfg.resume_from_checkpoint` goes on from one.
        """
        cfg = self.cfg
        if cfg.output_path is not None:
            Path(cfg.output_path).mkdir(parents=True, exist_ok=True)
        self._start_wandb()
        with closing(self._batches()) as batches:
            trainer = _SweepTrainer(
                cfg.to_sae_trainer_config(),
                self.saes,
                {name: source.key for name, source in self._sources.items()},
                batches,
                save_checkpoint_fn=self.save_checkpoint,
                log_file=Path(cfg.output_path) / TRAIN_LOG_FILENAME if cfg.output_path else None,
                log_every=cfg.logger.wandb_log_frequency,
            )
            if cfg.resume_from_checkpoint is not None:
                trainer.load_checkpoint(cfg.resume_from_checkpoint)
                self.activations_store.load_from_checkpoint(cfg.resume_from_checkpoint)
            for sae in self.saes.values():
                self.sae = sae
                self._compile_sae_if_needed()
            self.run_trainer_with_interruption_handling(trainer)
        finished = {name: self._finish(name, trainer) for name in self.saes}
        if cfg.logger.log_to_wandb:
            wandb.finish()
        return finished

    def _batches(self) -> Generator[dict[str, Tensor], None, None]:
        """Every batch as each kind of reader takes it, made once however many read it."""
        sources = {source.key: source for source in self._sources.values()}
        with closing(self._stream()) as stream:
            for batch in stream:
                yield {key: source.view(batch) for key, source in sources.items()}

    @override
    def save_checkpoint(self, checkpoint_path: Path | None) -> None:
        """Also what SAELens's trainer of many does not save: uniform draws."""
        if checkpoint_path is not None:
            for name, sae in self.saes.items():
                save_uniform_draw(sae, checkpoint_path / name)
        super().save_checkpoint(checkpoint_path)

    def _finish(self, name: str, trainer: _SweepTrainer) -> SAE[Any]:
        """The trained SAE for inference, saved if there is an `output_path`."""
        self.sae = training_sae = self.saes[name]
        if isinstance(training_sae, RoutedTrainingSAE) and training_sae.cfg.decoder_norm_interval:
            training_sae.normalize_decoder()
        folder = None if self.cfg.output_path is None else Path(self.cfg.output_path) / name
        if folder is not None:
            sparsity = trainer.trainers[name].log_feature_sparsity
            self.save_final_sae(training_sae, str(folder), sparsity)
        if self._sources[name].kind != "normalized":
            return to_inference(training_sae)
        sae = as_routed(training_sae)
        if folder is not None:  # the RouteSAE also carries the normalisation it was trained with
            sae.save_model(folder)
        return sae


# --- one stream, many readers --------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """What an entry is given of a batch `[tokens, L, d]`."""

    kind: Literal["routed", "stack", "normalized"]
    """What the SAE's training pass takes: residual streams (twice), or n(x) of one block."""
    blocks: tuple[int, ...]
    rows: tuple[int, ...]
    """Where those blocks are among the routed ones."""
    dtype: torch.dtype
    """What n(x) is computed in: the SAE's own, as in a RouteSAE."""

    @classmethod
    def of(cls, name: str, entry: SweepEntry, routed_blocks: list[int]) -> _Source:
        blocks = routed_blocks if entry.blocks is None else entry.blocks
        if not blocks or blocks != [block for block in routed_blocks if block in blocks]:
            raise ValueError(
                f"entry {name!r}: blocks={blocks} must ascend and be some of the routed blocks "
                f"{routed_blocks} (routed_layers)"
            )
        kind: Literal["routed", "stack", "normalized"] = "normalized"
        if isinstance(entry.sae, RoutedTrainingConfig):
            kind = "routed"
        elif isinstance(entry.sae, StackedTrainingConfig):
            kind = "stack"
        elif len(blocks) > 1:
            raise ValueError(
                f"entry {name!r}: {entry.sae.architecture()!r} has no router and reads one block; "
                f"give blocks=[{blocks[-1]}], or take route_{entry.sae.architecture()}"
            )
        rows = tuple(routed_blocks.index(block) for block in blocks)
        return cls(kind, tuple(blocks), rows, str_to_dtype(entry.sae.dtype))

    @property
    def key(self) -> str:
        normalized = self.kind == "normalized"
        return f"normalized {self.dtype} {self.rows}" if normalized else f"streams {self.rows}"

    @property
    def is_view(self) -> bool:
        """Whether it needs no copy: residual streams that are neighbours in the batch."""
        return self.kind != "normalized" and self.rows[-1] - self.rows[0] + 1 == len(self.rows)

    def view(self, batch: Float[Tensor, "tokens L d"]) -> Float[Tensor, "tokens *L d"]:
        """The entry's part of a batch."""
        if self.kind == "normalized":
            return normalize(batch[:, self.rows[0]].to(self.dtype))
        if self.is_view:
            return batch[:, self.rows[0] : self.rows[-1] + 1]
        return batch[:, list(self.rows)]

    def sized(self, name: str, sae: TrainingSAEConfig, d_model: int) -> TrainingSAEConfig:
        """The configuration with the number of layers, and the width they have together."""
        if self.kind == "normalized":
            return sae
        changes = {"n_routed_layers": len(self.blocks)}
        if self.kind == "stack":
            changes["d_in"] = len(self.blocks) * d_model
        try:
            return replace(sae, **changes)  # type: ignore[arg-type]
        except ValueError as error:  # layer_shares of another number of layers
            raise ValueError(f"entry {name!r}: {error}") from error


class _SweepTrainer(MultiSAETrainer):
    """SAELens's trainer of many, with a log, exact resuming and stops between steps."""

    def __init__(self, *args: Any, log_file: Path | None, log_every: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.log_file, self.log_every = log_file, log_every
        self.stop_requested = False

    @override
    def load_checkpoint(self, path: str | Path) -> None:
        super().load_checkpoint(path)
        # SAELens saves before it counts the step, so its number can be one short
        self.n_training_steps = self.n_training_samples // self.cfg.train_batch_size_samples
        for name, trainer in self.trainers.items():
            trainer.n_training_steps = self.n_training_steps
            load_uniform_draw(trainer.sae, Path(path) / name)
        passed = self.n_training_samples
        self.checkpoint_thresholds = [t for t in self.checkpoint_thresholds if t >= passed]

    @override
    def _update_pbar(
        self, step_outputs: dict[str, TrainStepOutput], pbar: tqdm, update_interval: int = 100
    ) -> None:
        """Called by `fit` at the end of every step."""
        is_last = self.n_training_samples >= self.cfg.total_training_samples
        if self.n_training_steps % self.log_every == 0 or is_last:
            records = [self._record(name, output) for name, output in step_outputs.items()]
            if self.log_file is not None:
                with self.log_file.open("a") as file:
                    file.writelines(json.dumps(record) + "\n" for record in records)
            losses = [record["loss"] for record in records]
            pbar.set_description(f"Training {len(records)} dictionaries")
            pbar.set_postfix_str(f"losses {min(losses):.3f} to {max(losses):.3f}")
            pbar.update(self.n_training_samples - pbar.n)
        if self.stop_requested:
            raise InterruptedException

    def _record(self, name: str, output: TrainStepOutput) -> dict[str, Any]:
        try:
            return {"name": name, **step_record(self.trainers[name], output)}
        except ValueError as error:
            raise ValueError(
                f"entry {name!r}: {error}; a sweep without this entry can go on from there"
            ) from error


_TAKEN_SUFFIXES = {".json", ".jsonl", ".csv", ".parquet", ".html", ".svg"}


def _check_entries(cfg: RouteSAERunnerConfig, entries: Mapping[str, SweepEntry]) -> None:
    """What can be known before the language model is loaded."""
    if not entries:
        raise ValueError("the sweep has no entries: name at least one dictionary to train")
    if cfg.from_pretrained_path is not None:
        raise ValueError(
            f"from_pretrained_path={cfg.from_pretrained_path!r}: a sweep starts every entry anew"
        )
    for name, entry in entries.items():
        _check_name(name)
        sae = entry.sae
        width = getattr(sae, "d_model", sae.d_in)  # a crosscoder's d_in is L * d_model
        if width != cfg.sae.d_in:
            raise ValueError(
                f"entry {name!r}: d_in={width}, but the sweep's sae.d_in is {cfg.sae.d_in}"
            )
        k = getattr(sae, "k", None)
        if k is not None and not 0 < k <= sae.d_sae:
            raise ValueError(f"entry {name!r}: k={k} must be between 1 and d_sae={sae.d_sae}")
        if sae.normalize_activations != "none":
            raise ValueError(
                f"entry {name!r}: normalize_activations={sae.normalize_activations!r} must be "
                "'none': every entry is given n(x)"
            )
        is_plain = not isinstance(sae, RoutedTrainingConfig | StackedTrainingConfig)
        routed = f"route_{sae.get_inference_config_class().architecture()}"
        if is_plain and routed not in SAE_CLASS_REGISTRY:
            raise ValueError(
                f"entry {name!r}: architecture={sae.architecture()!r} cannot be saved with its "
                f"normalisation, for there is no {routed!r}"
            )
        if cfg.output_path is not None and cfg.resume_from_checkpoint is None:
            require_new_folder(Path(cfg.output_path) / name)
    if cfg.output_path is not None and cfg.resume_from_checkpoint is None:
        require_new_folder(cfg.output_path, also_holds="sweep.json")


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[\w .,=+@()'-]+", name) or name.strip(" .") != name:
        raise ValueError(
            f'entry {name!r}: its name is that of a folder; use letters, digits and " _.,=+@()\'-"'
        )
    if name == "checkpoints" or Path(name).suffix in _TAKEN_SUFFIXES:
        raise ValueError(f"entry {name!r}: the sweep itself writes {name!r}; take another name")


def _check_checkpoint(
    path: Path, configs: Mapping[str, TrainingSAEConfig], sources: Mapping[str, _Source]
) -> None:
    """Raise unless a checkpoint is whole and of these entries."""
    where = f"resume_from_checkpoint={str(path)!r}"
    if not (path / ACTIVATIONS_STORE_STATE_FILENAME).exists():  # what is written last
        raise ValueError(f"{where}: holds no whole checkpoint; take the folder of another step")
    for name, config in configs.items():
        file = path / name / SAE_CFG_FILENAME
        if not file.exists():
            saved = sorted(found.parent.name for found in path.glob(f"*/{SAE_CFG_FILENAME}"))
            raise ValueError(f"{where}: holds no entry {name!r}; it has {', '.join(saved)}")
        saved = json.loads(file.read_text())
        # the architecture first: much else follows from it
        wanted = {"architecture": config.architecture(), **config.to_dict(), "metadata": {}}
        wanted = json.loads(json.dumps(wanted))
        blocks = saved["metadata"].get("routed_layers")
        if blocks != list(sources[name].blocks):
            saved["blocks"], wanted["blocks"] = blocks, list(sources[name].blocks)
        for field in wanted:
            if field not in _FILLED_IN | {"device"} and wanted[field] != saved.get(field):
                raise ValueError(
                    f"{where}: entry {name!r} has {field}={saved.get(field)!r} there, not "
                    f"{wanted[field]!r}; go on with what it was started with"
                )


# --- the table -----------------------------------------------------------------------------------


class SweepResult(NamedTuple):
    """What became of every entry."""

    rows: list[dict[str, Any]]
    """One for each entry: what it is, its parameters and its metrics."""

    def write(self, folder: str | Path) -> list[Path]:
        """Write `sweep.json`, `sweep.csv` and `sweep.parquet`; gives back their paths."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"sweep.{suffix}" for suffix in ("json", "csv", "parquet")]
        paths[0].write_text(json.dumps(self.rows, indent=1) + "\n")
        flat = [_flat(row) for row in self.rows]
        columns = list(dict.fromkeys(column for row in flat for column in row))
        table = pa.table({column: [row.get(column) for row in flat] for column in columns})
        pa_csv.write_csv(table, paths[1])
        pq.write_table(table, paths[2])
        return paths


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with one column for each element of a list."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, list):
            flat.update({f"{key}_{i}": item for i, item in enumerate(value)})
        else:
            flat[key] = value
    return flat


def evaluate_sweep(
    model: LanguageModel,
    entries: Mapping[str, SweepEntry],
    saes: Mapping[str, SAE[Any]],
    dataset: Any,
    *,
    max_tokens: int = 50_000,
    batch_size: int = 8,
) -> SweepResult:
    """The table of a sweep, all of them on the same held-out text.

    Args:
        model: The model they were trained on.
        entries: What was trained.
        saes: What `SweepRunner.run` gave back.
        dataset: A dataset, or what `load_text_dataset` takes.
        max_tokens: Tokens to read, excluded ones included.
        batch_size: Contexts in one forward pass.
    """
    evaluations = evaluate_all(model, saes, dataset, max_tokens=max_tokens, batch_size=batch_size)
    return SweepResult(
        [_row(name, entry, saes[name], evaluations[name]) for name, entry in entries.items()]
    )


_DESCRIBED = ("routing", "aggregation", "loss", "router_objective", *SPARSITY_FIELDS)


def _row(name: str, entry: SweepEntry, sae: SAE[Any], evaluation: Evaluation) -> dict[str, Any]:
    described = {key: getattr(entry.sae, key, None) for key in _DESCRIBED}
    downstream = evaluation.downstream
    return {
        "name": name,
        "label": entry.label or name,
        "seed": entry.seed,
        "architecture": entry.sae.architecture(),
        "blocks": sae.cfg.metadata.routed_layers,
        "d_sae": entry.sae.d_sae,
        **described,
        "n_parameters": _n_parameters(sae),
        **evaluation.reconstruction._asdict(),
        **({} if downstream is None else downstream._asdict()),
    }


def _n_parameters(sae: SAE[Any]) -> int:
    """Parameters that do something: with one layer to choose from the router has none."""
    counts = {name: parameter.numel() for name, parameter in sae.named_parameters()}
    if sae.cfg.n_routed_layers == 1:  # type: ignore[attr-defined]
        counts.pop("W_router", None)
    return sum(counts.values())
