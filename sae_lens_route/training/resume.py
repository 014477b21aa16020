"""Which run a checkpoint belongs to: what may differ on resuming, and how a run is extended.

Everything in the configuration belongs to a run, except the fields of `MAY_CHANGE`, which do not
influence the result or only its last bits (the device, compilation). `training_tokens` may grow
with `extend_run`: the learning rate then is `lr` from the checkpoint on, and falls linearly to 0
over the last 20 % of the steps that are added, whatever the schedule of the run was. Weights,
Adam's moments and the position in the text continue unchanged.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME

from sae_lens_route.config import RouteSAERunnerConfig, config_fields
from sae_lens_route.errors import UserError
from sae_lens_route.models.trust import CHECKPOINT, require_harmless
from sae_lens_route.training.checkpoint import (
    LATEST_FILENAME,
    checkpoint_errors,
    newest_checkpoint,
    require_new_folder,
    require_whole,
    run_state,
)

MAY_CHANGE = frozenset(
    {
        # where results go, and how often
        "output_path",
        "checkpoint_path",
        "n_checkpoints",
        "keep_checkpoints",
        "save_final_checkpoint",
        "resume_from_checkpoint",
        "logger",
        "verbose",
        # evaluation, which training does not depend on
        "n_eval_batches",
        "eval_batch_size_prompts",
        # how the same numbers are computed
        "device",
        "llm_device",
        "act_store_device",
        "prefetch_llm_batches",
        "compile_llm",
        "llm_compilation_mode",
        "compile_sae",
        "sae_compilation_mode",
        "on_bad_step",
        "streaming",
        "cache_activations",
        # set by this package or SAELens
        "extend_run",
        "sae_lens_version",
        "sae_lens_training_version",
        "hook_eval",
        "dead_feature_threshold",
    }
)
"""Fields of the configuration that a run may resume with other values of."""

_SAE_MAY_CHANGE = {"metadata", "device", "sae_lens_version", "sae_lens_training_version"}
_UNRESOLVED = {"routed_blocks", "hook_names", "hook_name", "sae.n_routed_layers", "sae.d_in"}
_BY_EXTENSION = {"training_tokens", "lr_warm_up_steps", "lr_decay_steps"}
_BY_EXTENSION |= {"lr_scheduler_name", "extended_from"}


def resumed_config(
    folder: Path, changes: Mapping[str, str], extend_to: int | None = None
) -> RouteSAERunnerConfig:
    """The configuration of the run in a folder, resuming from its newest checkpoint.

    Args:
        folder: The output folder of a run, or a checkpoint.
        changes: Fields with other values, as text; `require_same_run` says which may change.
        extend_to: Train up to so many tokens, more than the run had.

    Raises:
        UserError: there is no checkpoint, a field is unknown, or the model that the checkpoint
            names could run code.
    """
    checkpoint = require_whole(folder)
    values = _saved_config(checkpoint)
    fields = config_fields(values["sae"]["architecture"])
    values["output_path"] = str(folder) if checkpoint != folder else _run_folder(folder, values)
    values |= {"checkpoint_path": str(checkpoint.parent), "resume_from_checkpoint": str(checkpoint)}
    _require_harmless_model(values, changes)
    values["extend_run"] = extend_to is not None
    values["seqpos_slice"] = tuple(values["seqpos_slice"])  # JSON has no tuples
    if extend_to is not None:
        values["training_tokens"] = extend_to
    parts = {"runner": values, "sae": values["sae"], "logger": values["logger"]}
    for name, text in changes.items():
        part = next((part for part in fields if name in fields[part]), None)
        if part is None:
            raise UserError(f"{name}={text!r}: a run resumes with the fields it began with")
        parts[part][name] = fields[part][name].read(text)
    if "device" in changes:
        values |= {"llm_device": None, "act_store_device": None}
        values["sae"]["device"] = values["device"]
    cfg = RouteSAERunnerConfig.from_dict(values)
    assert isinstance(cfg, RouteSAERunnerConfig)
    return cfg


def _require_harmless_model(values: Mapping[str, Any], changes: Mapping[str, str]) -> None:
    """Refuse a checkpoint whose model could run code, unless the user names model and options."""
    name = None if "model_name" in changes else values["model_name"]
    given = "model_from_pretrained_kwargs" in changes
    options = {} if given else values["model_from_pretrained_kwargs"] or {}
    require_harmless(name, values["model_class_name"], options, CHECKPOINT)


def _run_folder(checkpoint: Path, saved: Mapping[str, Any]) -> str | None:
    """Output folder of the run around a checkpoint, wherever it was moved or is seen from."""
    output, parent = saved["output_path"], saved["checkpoint_path"]
    if output is None or parent is None:
        return output
    found = Path(os.path.normpath(checkpoint.parent / os.path.relpath(output, parent)))
    return str(found) if (found / LATEST_FILENAME).exists() else output


def prepare_resume(cfg: RouteSAERunnerConfig, ignored: Collection[str] = ()) -> None:
    """Find the checkpoint to resume from, set the schedule of an extended run, and compare.

    Args:
        cfg: Its `resume_from_checkpoint` becomes the folder of the checkpoint.
        ignored: Fields that are not compared.

    Raises:
        UserError: no whole checkpoint, a finished run, or a checkpoint of another run.
    """
    checkpoint = require_whole(str(cfg.resume_from_checkpoint))
    cfg.resume_from_checkpoint = str(checkpoint)
    saved = _saved_config(checkpoint)
    if cfg.extend_run:
        cfg.extend_from(run_state(checkpoint)["n_training_samples"])
    else:
        if saved.get("extended_from") is not None:
            cfg.extend_from(saved["extended_from"])
        _require_unfinished(cfg, saved)
    output = None if cfg.output_path is None else Path(cfg.output_path).resolve()
    if output is not None and output in checkpoint.resolve().parents:
        cfg.checkpoint_path = str(checkpoint.parent)  # all checkpoints of a run in one folder
    require_same_run(cfg, ignored)


def require_same_run(cfg: RouteSAERunnerConfig, ignored: Collection[str] = ()) -> None:
    """Check that the checkpoint is one of the run that a configuration describes.

    Fields that the model decides are compared once they are resolved.

    Raises:
        UserError: it is not; the message names the first field that differs, with both values.
    """
    checkpoint = Path(str(cfg.resume_from_checkpoint))
    there, here = _fields(_saved_config(checkpoint)), _fields(cfg.to_dict())
    unresolved = _UNRESOLVED if cfg.hook_names is None else set()
    extended = _BY_EXTENSION if cfg.extend_run else set()
    for name, value in here.items():
        part, _, rest = name.partition(".")
        if part in MAY_CHANGE or part in ignored or name in extended or name not in there:
            continue
        if part == "sae" and rest in _SAE_MAY_CHANGE:
            continue
        if name in unresolved and (name != "routed_blocks" or value is None):
            continue
        if value != there[name]:
            more = "; extend_run (--extend) trains on" if name == "training_tokens" else ""
            raise UserError(
                f"resume_from_checkpoint={str(checkpoint)!r}: the run there has "
                f"{name}={there[name]!r}, not {value!r}; resume with its own configuration{more}"
            )


def require_fresh_folder(output_path: str | Path) -> None:
    """Check that a new run may write to a folder.

    Raises:
        UserError: it holds a run, finished or not; the message says how to resume.
    """
    require_new_folder(output_path)
    checkpoint = newest_checkpoint(Path(output_path))
    if checkpoint is not None:
        tokens = run_state(checkpoint)["n_training_samples"]
        is_sweep = not (checkpoint / SAE_CFG_FILENAME).exists()
        raise UserError(
            f"output_path={str(output_path)!r}: holds a run that ended after a checkpoint at "
            f"{tokens:,} tokens; {resume_hint(Path(output_path), is_sweep)}, or give another folder"
        )


def resume_hint(folder: Path, is_sweep: bool) -> str:
    """How the run in a folder is resumed."""
    python = f"resume_from_checkpoint={str(folder)!r}"
    quoted = shlex.quote(str(folder))
    if is_sweep:
        return f"resume with `--resume-from-checkpoint {quoted}` (in Python: {python})"
    return f"resume with `sae-lens-route train --resume {quoted}` (in Python: {python})"


def _require_unfinished(cfg: RouteSAERunnerConfig, saved: Mapping[str, Any]) -> None:
    final = Path(str(cfg.output_path)) / RUNNER_CFG_FILENAME
    if cfg.output_path is None or not (final.parent / SAE_CFG_FILENAME).exists():
        return
    finished = json.loads(final.read_text(encoding="utf-8"))
    if finished["training_tokens"] >= saved["training_tokens"]:
        raise UserError(
            f"output_path={cfg.output_path!r}: its run is finished; extend_run (`--extend TOKENS`) "
            "trains on"
        )


def _saved_config(checkpoint: Path) -> dict[str, Any]:
    with checkpoint_errors(checkpoint):
        return json.loads((checkpoint / RUNNER_CFG_FILENAME).read_text(encoding="utf-8"))


def _fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields by name as JSON has them; those of the SAE begin with `sae.`."""
    plain = json.loads(json.dumps(config))
    sae = plain.pop("sae")
    # the architecture first, because other fields follow from it
    first = {"sae.architecture": sae.pop("architecture")}
    return {**first, **plain, **{f"sae.{name}": value for name, value in sae.items()}}
