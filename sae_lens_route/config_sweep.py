"""The configuration file of a sweep: fields as for one run, and the dictionaries under `runs`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from sae_lens_route.config import (
    RouteSAERunnerConfig,
    runner_config,
    trainable_architectures,
)
from sae_lens_route.config_fields import ConfigField, fields_of, read_config_file
from sae_lens_route.errors import UserError
from sae_lens_route.saes.kinds import SPARSITY_FIELDS

_OF_ENTRIES = {
    "blocks": ConfigField("blocks", list[int] | None, None, "Routed blocks it reads."),
    "lr": ConfigField("lr", float | None, None, "Its peak learning rate."),
}
"""Fields of a dictionary that its training configuration does not have."""


class SweepConfig(NamedTuple):
    """What a sweep trains, as `expand_runs(runs, cfg.d_model, seeds)` takes it."""

    cfg: RouteSAERunnerConfig
    runs: dict[str, dict[str, Any]]
    """Settings of the dictionaries by label."""
    seeds: list[int]


def sweep_config(path: str | Path, **overrides: Any) -> SweepConfig:
    """A sweep from a YAML or JSON file.

    The file holds fields of `RouteSAERunnerConfig`, `runs` (label -> fields of its training
    configuration, `architecture`, `blocks` and `lr`; sparsity fields may be lists) and `seeds`.
    Fields of the training configuration outside `runs` apply to all runs whose architecture has
    them.

    Args:
        path: The file.
        overrides: Fields that override the file's.

    Raises:
        UserError: The file cannot be read, an unknown field, or a value its field rejects.
    """
    content = {**read_config_file(path), **overrides}
    runs, seeds = content.pop("runs", None), content.pop("seeds", None)
    cfg = runner_config(content)
    if cfg.output_path is None:
        raise UserError("output_path: name a folder for the dictionaries and the table")
    if not isinstance(runs, dict) or not runs:
        raise UserError("runs: name at least one dictionary to train, as `LABEL: {k: 16}`")
    seeds = [cfg.seed] if seeds is None else seeds
    if not isinstance(seeds, list) or any(type(seed) is not int for seed in seeds):
        raise UserError(f"seeds={seeds!r}: must be a list of int")
    settings: dict[str, dict[str, Any]] = {}
    for label, run in runs.items():
        try:
            settings[str(label)] = _run_settings(run, content, cfg)
        except UserError as error:
            raise UserError(f"run {label!r} of the sweep: {error}") from error
    return SweepConfig(cfg, settings, seeds)


def _run_settings(
    run: Any, content: Mapping[str, Any], cfg: RouteSAERunnerConfig
) -> dict[str, Any]:
    """One run's fields, and those the file gives for all runs that its architecture has."""
    run = {} if run is None else run
    if not isinstance(run, dict):
        raise UserError(f"{run!r} must be fields and values")
    if "architecture" in content:
        run = {"architecture": content["architecture"], **run}
    architecture = run.get("architecture", "route_topk")
    if architecture not in SAE_TRAINING_CLASS_REGISTRY:
        return run  # `expand_runs` lists the architectures
    fields = {**fields_of(SAE_TRAINING_CLASS_REGISTRY[architecture][1]), **_OF_ENTRIES}
    shared = {name for config in trainable_architectures().values() for name in fields_of(config)}
    settings: dict[str, Any] = {"d_sae": cfg.sae.d_sae, "device": cfg.device, "dtype": cfg.dtype}
    settings |= {
        name: fields[name].read(value)
        for name, value in content.items()
        if name in shared and name in fields and name not in ("d_in", "device", "dtype")
    }
    for name, value in run.items():
        if name not in fields:
            settings[name] = value  # `architecture`, or a field that `expand_runs` rejects
        elif name in SPARSITY_FIELDS and isinstance(value, list):
            settings[name] = [fields[name].read(each) for each in value]
        else:
            settings[name] = fields[name].read(value)
    return settings
