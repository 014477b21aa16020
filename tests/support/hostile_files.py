"""Files from an attacker, of every kind that is read besides model folders (`hostile.py`).

`good_files` makes a good folder of each kind, `payloads` lists what can be put into one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset

from support.command_line import SMALL, as_options, call, write_yaml
from support.hostile import MODEL_PAYLOADS, Bomb, bomb, code, importable, model_folder
from support.small import TINYLLAMA

Payload = Callable[[Path, Path], None]
"""Changes a good folder so that a marker is written if a reader runs code: `(folder, marker)`."""

RUN = {**SMALL, "routed_blocks": [3, 5, 6], "d_sae": 64}
TEXTS = ["def read(path):\n    return path", "import os", "for i in range(3):\n    print(i)"] * 40


# --- good folders --------------------------------------------------------------------------------


def good_files(parent: Path) -> dict[str, Path]:
    """A folder of each kind, good to the last byte, in `parent`."""
    kinds = ("sae", "checkpoint", "text", "dataset", "features", "config", "reference")
    folders = {kind: parent / kind for kind in kinds}
    run = {**RUN, "output_path": folders["sae"], "n_checkpoints": 1}
    _must_work("train", *as_options(run))
    _interrupted(folders["sae"], folders["checkpoint"])
    for kind in ("text", "config", "reference"):
        folders[kind].mkdir()
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (folders["text"] / "rows.jsonl").write_text(rows)
    Dataset.from_dict({"text": TEXTS}).save_to_disk(folders["dataset"])
    _features(folders["sae"], folders["features"])
    write_yaml(folders["config"] / "run.yaml", RUN)
    write_yaml(folders["config"] / "sweep.yaml", {**RUN, "runs": {"a": {"k": 4}}, "seeds": [0]})
    torch.save(_reference_weights(), folders["reference"] / "RouteSAE.pt")
    return folders


def _must_work(*arguments: Any) -> None:
    result = call(*arguments)
    assert result.exit_code == 0, result.output


def _interrupted(run: Path, checkpoint: Path) -> None:
    """Move a run's checkpoint, and the pointer to it, to a folder that has no end of the run."""
    checkpoint.mkdir()
    for name in ("checkpoints", "latest"):
        shutil.move(run / name, checkpoint / name)
    (file,) = checkpoint.rglob("runner_cfg.json")
    _edit(file, checkpoint_path=str(file.parents[1]), output_path=str(checkpoint))


def _features(sae: Path, folder: Path) -> None:
    size = ("--max-tokens", 512, "--batch-size", 4, "--threshold", 0.2)
    _must_work("features", sae, *size, "--output", folder)
    _must_work("interpret", folder)
    reply = {
        **{"feature": 0, "status": "valid", "category": "low-level", "score": 4},
        **{"explanation": "why", "reply": "{}", "model": "judge", "request_sha256": "0"},
        **{"attempts": 1, "prompt_tokens": None, "completion_tokens": None},
    }
    (folder / "judge.jsonl").write_text(json.dumps(reply) + "\n")
    (folder / "sheet.csv").write_text("feature,category,score,explanation\n0,low-level,4,why\n")


def _reference_weights() -> dict[str, torch.Tensor]:
    """A checkpoint by the names of the paper's code, of three blocks."""
    return {
        "router.weight": torch.randn(3, 8),
        "sae.encoder.weight": torch.randn(16, 8),
        "sae.decoder.weight": torch.randn(8, 16),
        "sae.pre_bias": torch.zeros(8),
        "sae.latent_bias": torch.zeros(16),
    }


# --- payloads ------------------------------------------------------------------------------------


def payloads(kind: str, good: Path) -> dict[str, Payload]:
    """What can be put into a good folder of a kind, by name."""
    found = {"importable modules": importable, "pickles by other names": _other_pickles}
    for path in sorted(good.rglob("*")):
        if path.is_file() and path.name not in (".lock", "train_log.jsonl"):
            name = path.relative_to(good)
            found[f"pickle as {path.name}"] = partial(_pickle, name)
            found[f"torch.save as {path.name}"] = partial(_torch_save, name)
    return {**found, **_OWN[kind]}


def _pickle(name: str | Path, folder: Path, marker: Path) -> None:
    (folder / name).write_bytes(bomb(marker))


def _torch_save(name: str | Path, folder: Path, marker: Path) -> None:
    torch.save({"W_dec": Bomb(marker)}, folder / name)


def _other_pickles(folder: Path, marker: Path) -> None:
    """Pickles by the names that SAELens, transformers and datasets read, in every folder."""
    names = ("trainer_state.pt", "optimizer.pt", "activations_store_state.pt", "sae_weights.pt")
    names += ("sparsity.pt", "cfg.pkl", "training_args.bin", "pytorch_model.bin", "data.pkl")
    for each in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        for name in names:
            _pickle(name, each, marker)


def _only(name: str, write: Payload, folder: Path, marker: Path) -> None:
    """One file, in place of all others."""
    shutil.rmtree(folder)
    folder.mkdir()
    write(folder / name, marker)


def _write_pickle(file: Path, marker: Path) -> None:
    file.write_bytes(bomb(marker))


def _write_code(file: Path, marker: Path) -> None:
    file.write_text(code(marker))


def _write_text(file: Path, marker: Path) -> None:
    """Rows of text that is code."""
    text = f"open({str(marker)!r}, 'w').write('ran')"
    file.write_text({".csv": f'text\n"{text}"\n'}.get(file.suffix, json.dumps({"text": text})))


def _write_table(file: Path, marker: Path) -> None:
    """A column of an extension type that older pyarrow reads by unpickling its metadata."""
    table = pa.table({"text": TEXTS}, schema=pa.schema([_extension(marker)]))
    if file.suffix == ".parquet":
        pq.write_table(table, file)
    else:
        with pa.OSFile(str(file), "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
            writer.write_table(table)


def _extension(marker: Path, name: str = "text", kind: pa.DataType | None = None) -> pa.Field:
    metadata = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": bomb(marker),
    }
    return pa.field(name, kind or pa.string(), metadata=metadata)


def _extension_in(name: str, folder: Path, marker: Path) -> None:
    """The same in a good table, which keeps its other columns and its metadata."""
    table = pq.read_table(folder / name)
    first = table.schema.field(0)
    schema = table.schema.set(0, _extension(marker, first.name, first.type))
    pq.write_table(pa.table(table.columns, schema=schema), folder / name)


def _pickled_ranking(folder: Path, marker: Path) -> None:
    """Scores without a judge's, which would be read first."""
    (folder / "judge.jsonl").unlink()
    _pickle("surface_ranking.json", folder, marker)


def _dataset_script(folder: Path, marker: Path) -> None:
    """Code by the names that `datasets` runs, and a card that asks for it."""
    for name in (f"{folder.name}.py", "json.py", "text.py"):
        (folder / name).write_text(code(marker))
    (folder / "json").mkdir()
    (folder / "json" / "json.py").write_text(code(marker))
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  script: text.py\n")


def _trusting_model(folder: Path, marker: Path) -> None:
    """A saved SAE that brings a model with code of its own and asks to trust it."""
    model = model_folder(folder / "model", "unknown_type", marker)
    config = json.loads((folder / "cfg.json").read_text())
    config["metadata"] |= {
        "model_name": str(model),
        "model_class_name": "AutoModelForCausalLM",
        "model_from_pretrained_kwargs": {"trust_remote_code": True},
    }
    (folder / "cfg.json").write_text(json.dumps(config))


def _trusting_run(payload: str, folder: Path, marker: Path, **changes: Any) -> None:
    """The same of a checkpoint."""
    model = model_folder(folder / "model", payload, marker)
    (file,) = folder.rglob("runner_cfg.json")
    _edit(file, model_name=str(model), **changes)


def _run_of_script(folder: Path, marker: Path) -> None:
    """A checkpoint of a run on a data set with a script."""
    data = folder / "data"
    data.mkdir()
    _write_text(data / "rows.jsonl", marker)
    _dataset_script(data, marker)
    (file,) = folder.rglob("runner_cfg.json")
    _edit(file, dataset_path=str(data), dataset_trust_remote_code=True)


def _pointer(folder: Path, marker: Path) -> None:
    """A pointer to a checkpoint of nothing but pickles."""
    (checkpoint,) = (path.parent for path in folder.rglob("run_state.json"))
    other = folder / "other" / "999"
    shutil.copytree(checkpoint, other)
    for path in other.iterdir():
        _pickle(path.name, other, marker)
    (folder / "latest").write_text("other/999")


def _names_of_code(name: str, folder: Path, marker: Path) -> None:
    """A configuration that names a class in the folder where the package's own are named."""
    (folder / "payload.py").write_text(code(marker))
    (file,) = folder.rglob(name)
    content = json.loads(file.read_text())
    for part in (content, content.get("sae", {})):
        part |= {"architecture": "payload.Model", "activation_fn": "payload.generate"}
    file.write_text(json.dumps(content))


def _yaml_tags(marker: Path) -> dict[str, str]:
    """Tags by which PyYAML's unsafe loaders run code."""
    call_open = f'["open({str(marker)!r}, {"w"!r}).write({"ran"!r})"]'
    return {
        "apply": f"!!python/object/apply:exec {call_open}",
        "new": f"!!python/object/new:exec {call_open}",
        "apply with keywords": f"!!python/object/apply:builtins.exec {{args: {call_open}}}",
        "apply as a key": f"? !!python/object/apply:exec {call_open}\n: 1",
    }


YAML_TAGS = tuple(_yaml_tags(Path()))


def _yaml(name: str, tag: str, folder: Path, marker: Path) -> None:
    """A good configuration with a value, or a key, that is code."""
    text = _yaml_tags(marker)[tag]
    with (folder / name).open("a") as file:
        file.write(f"{text if text[0] == '?' else f'lr: {text}'}\n")


def _yaml_in(name: str, folder: Path, marker: Path) -> None:
    """YAML where JSON is expected."""
    (file,) = folder.rglob(name)
    file.write_text(f"architecture: {_yaml_tags(marker)['apply']}\n")


def _mixed_checkpoint(folder: Path, marker: Path) -> None:
    """Good weights of the paper's code, and an object between them."""
    torch.save({**_reference_weights(), "step": Bomb(marker)}, folder / "RouteSAE.pt")


_SUFFIXES = ("jsonl", "json", "parquet", "arrow", "csv", "txt", "pkl")

_OWN: dict[str, dict[str, Payload]] = {
    "sae": {
        "a model that asks for trust": _trusting_model,
        "names of code in cfg.json": partial(_names_of_code, "cfg.json"),
        "YAML as cfg.json": partial(_yaml_in, "cfg.json"),
    },
    "checkpoint": {
        "a model that asks for trust": partial(
            _trusting_run, "unknown_type", model_from_pretrained_kwargs={"trust_remote_code": True}
        ),
        "a model with code": partial(_trusting_run, "known_type"),
        "a model of pickles": partial(_trusting_run, "pickled_weights"),
        "text with a script": _run_of_script,
        "a pointer to pickles": _pointer,
        "names of code in runner_cfg.json": partial(_names_of_code, "runner_cfg.json"),
        "YAML as runner_cfg.json": partial(_yaml_in, "runner_cfg.json"),
        "YAML as trainer_state.json": partial(_yaml_in, "trainer_state.json"),
    },
    "text": {
        "a script": _dataset_script,
        "only a script": partial(_only, "text.py", _write_code),
        **{
            f"only a pickle as rows.{suffix}": partial(_only, f"rows.{suffix}", _write_pickle)
            for suffix in _SUFFIXES
        },
        **{
            f"only code as rows.{suffix}": partial(_only, f"rows.{suffix}", _write_text)
            for suffix in ("jsonl", "csv", "txt")
        },
        **{
            f"only an extension type in rows.{suffix}": partial(
                _only, f"rows.{suffix}", _write_table
            )
            for suffix in ("parquet", "arrow")
        },
    },
    "dataset": {
        "a script": _dataset_script,
        "an extension type": lambda folder, marker: _write_table(
            folder / "data-00000-of-00001.arrow", marker
        ),
    },
    "features": {
        "only a pickle as scores": _pickled_ranking,
        **{
            f"an extension type in {name}": partial(_extension_in, name)
            for name in ("features.parquet", "contexts.parquet")
        },
    },
    "config": {
        f"{tag} in {name}": partial(_yaml, name, tag)
        for tag in YAML_TAGS
        for name in ("run.yaml", "sweep.yaml")
    },
    "reference": {"an object between weights": _mixed_checkpoint},
}


def model_payload(name: str) -> Payload:
    """A payload of `hostile.py` for an empty folder."""

    def build(folder: Path, marker: Path) -> None:
        shutil.copytree(TINYLLAMA, folder, dirs_exist_ok=True)
        MODEL_PAYLOADS[name](folder, marker)

    return build


def _edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
