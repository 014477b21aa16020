"""What a sweep trains: entries, made from plain settings and checked before a model is loaded.

A `SweepEntry` names a SAELens training configuration, the blocks it reads and its seed. RouteSAEs
and crosscoders read all routed blocks or some of them; a plain SAELens configuration reads n(x) of
one block and is saved as the RouteSAE with that one routed block.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import TrainingSAEConfig

from sae_lens_route.config import RouteSAERunnerConfig, training_config
from sae_lens_route.config_fields import FILLED_IN, did_you_mean
from sae_lens_route.errors import UserError
from sae_lens_route.saes.crosscoder import CrosscoderTrainingConfigMixin
from sae_lens_route.saes.kinds import SPARSITY_FIELDS
from sae_lens_route.saes.routed_config import RoutedTrainingConfigMixin

_FILLED_IN = FILLED_IN | {"d_in"}
_WRITTEN_SUFFIXES = {".json", ".jsonl", ".csv", ".parquet", ".html", ".svg"}


@dataclass(frozen=True)
class SweepEntry:
    """One SAE of a sweep.

    Args:
        sae: What to train. `d_in` is the model's width; the number of blocks is filled in.
        blocks: Routed blocks that the SAE reads, ascending; None means all of them. A SAELens
            configuration without a router needs exactly one.
        seed: Seed of the weights.
        lr: Its peak learning rate; None takes the sweep's.
        label: Name in tables and figures; entries that differ only in seed and sparsity share it.
    """

    sae: TrainingSAEConfig
    blocks: list[int] | None = None
    seed: int = 42
    lr: float | None = None
    label: str = ""

    def __post_init__(self) -> None:
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise UserError(f"lr={self.lr!r}: must be a positive number")

    @property
    def is_plain(self) -> bool:
        """Whether the SAE is one of SAELens's, which reads a single block."""
        mixins = RoutedTrainingConfigMixin | CrosscoderTrainingConfigMixin
        return not isinstance(self.sae, mixins)


def expand_runs(
    runs: Mapping[str, Mapping[str, Any]], d_in: int, seeds: Sequence[int]
) -> dict[str, SweepEntry]:
    """Entries of a sweep from plain settings, one for each seed and sparsity.

    Args:
        runs: For each label the fields of its training configuration, and `architecture` (a SAELens
            training architecture, "route_topk" when left out), `blocks` and `lr`. Where k, or
            another of `SPARSITY_FIELDS`, is a list there is an entry for each of its values.
        d_in: Width of the model.
        seeds: Seeds of the weights.

    Raises:
        UserError: an unknown architecture or field, or a value it does not take, with the label.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds={list(seeds)}: give at least one, each once")
    entries: dict[str, SweepEntry] = {}
    for label, settings in runs.items():
        try:
            expanded = _expand(label, dict(settings or {}), d_in)
        except (TypeError, ValueError) as error:  # those of SAELens's configurations
            raise UserError(f"run {label!r} of the sweep: {error}") from error
        for name, entry in expanded.items():
            for seed in seeds:
                full_name = f"{name} seed={seed}" if len(seeds) > 1 else name
                if full_name in entries:
                    raise UserError(
                        f"run {label!r} of the sweep: there is another {full_name!r}; rename one"
                    )
                entries[full_name] = replace(entry, seed=seed)
    return entries


def _expand(label: str, settings: dict[str, Any], d_in: int) -> dict[str, SweepEntry]:
    """The entries of one run by name, one for each sparsity; the seed is set later."""
    blocks = settings.pop("blocks", None)
    if blocks is not None and not (
        isinstance(blocks, list) and all(type(b) is int for b in blocks)
    ):
        raise UserError(f"blocks={blocks!r}: must be a list of blocks")
    lr = settings.pop("lr", None)
    listed = [name for name in SPARSITY_FIELDS if isinstance(settings.get(name), list)]
    if not listed:
        return {label: SweepEntry(_sae_config(settings, d_in), blocks, lr=lr, label=label)}
    if len(listed) > 1:
        raise UserError(f"{' and '.join(listed)} are lists: only one can be")
    field, values = listed[0], settings[listed[0]]
    if not values or len(set(values)) < len(values):
        raise UserError(f"{field}={values}: give at least one value, each once")
    return {
        label if len(values) == 1 else f"{label} {field}={value}": SweepEntry(
            _sae_config({**settings, field: value}, d_in), blocks, lr=lr, label=label
        )
        for value in values
    }


def _sae_config(settings: Mapping[str, Any], d_in: int) -> TrainingSAEConfig:
    values = dict(settings)
    architecture = values.pop("architecture", "route_topk")
    if architecture not in SAE_TRAINING_CLASS_REGISTRY:
        known = ", ".join(sorted(SAE_TRAINING_CLASS_REGISTRY))
        raise UserError(f"architecture={architecture!r}: must be one of {known}")
    config_class = SAE_TRAINING_CLASS_REGISTRY[architecture][1]
    names = {field.name for field in fields(config_class)} - _FILLED_IN
    for name in values:
        if name in _FILLED_IN:
            raise UserError(f"{name}={values[name]!r}: is filled in; leave it out")
        if name not in names:
            hint = did_you_mean(name, names) or f"; it has {', '.join(sorted(names))}"
            raise UserError(f"unknown field {name!r} of {architecture}{hint}")
    if "d_sae" not in values:
        raise UserError("d_sae is missing: give the number of features")
    return training_config(architecture, {"d_in": d_in, **values})


def check_entries(cfg: RouteSAERunnerConfig, entries: Mapping[str, SweepEntry]) -> None:
    """Check all that can be known before the language model is loaded.

    Raises:
        UserError: no entries, or one that the sweep cannot train or save; the message names it.
    """
    if not entries:
        raise UserError("the sweep has no entries: name at least one SAE to train")
    if cfg.from_pretrained_path is not None:
        raise UserError(
            f"from_pretrained_path={cfg.from_pretrained_path!r}: a sweep trains every entry from "
            "new weights; leave it out"
        )
    for name, entry in entries.items():
        _check_name(name)
        width = getattr(entry.sae, "d_model", entry.sae.d_in)  # a crosscoder's d_in is L * d_model
        if width != cfg.d_model:
            raise UserError(
                f"entry {name!r}: d_in={width}, but the sweep's sae.d_in is {cfg.d_model}"
            )
        if entry.is_plain:
            _check_plain(name, entry.sae)


def _check_plain(name: str, sae: TrainingSAEConfig) -> None:
    """What the configurations of RouteSAEs and crosscoders check themselves."""
    k = getattr(sae, "k", None)
    if k is not None and not 0 < k <= sae.d_sae:
        raise UserError(f"entry {name!r}: k={k}: must be between 1 and d_sae={sae.d_sae}")
    if sae.normalize_activations != "none":
        raise UserError(
            f"entry {name!r}: normalize_activations={sae.normalize_activations!r}: every entry "
            "reads n(x), so it must be 'none'"
        )
    routed = f"route_{sae.get_inference_config_class().architecture()}"
    if routed not in SAE_CLASS_REGISTRY:
        raise UserError(
            f"entry {name!r}: architecture={sae.architecture()!r} cannot be saved with its "
            f"normalization, for there is no {routed!r}"
        )


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[\w .,=+@()'-]+", name) or name.strip(" .") != name:
        raise UserError(
            f'entry {name!r}: its name is that of a folder; use letters, digits and " _.,=+@()\'-"'
        )
    if name == "checkpoints" or Path(name).suffix in _WRITTEN_SUFFIXES:
        raise UserError(f"entry {name!r}: the sweep itself writes {name!r}; take another name")
