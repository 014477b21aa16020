"""What commands read from a stranger runs no code; what the user names or trusts is used.

`benchmarks/reliability/payloads.py` reads every payload in every way; here are some of each kind.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sae_lens import SAE
from support.command_line import as_options, call, error_line
from support.execution import runs_when_executed
from support.hostile import BLOCKS, model_folder, saved_sae
from support.hostile_files import RUN, good_files, payloads
from support.small import TINYLLAMA

from sae_lens_route.errors import UserError
from sae_lens_route.saes.metadata import routed_hook_name
from sae_lens_route.saes.reference_checkpoint import reference_converter
from sae_lens_route.training.resume import resumed_config

TEXT = ("--max-tokens", 64, "--dataset", "demo:heldout")
TRUST = {"trust_remote_code": True}


# --- the model of a saved SAE --------------------------------------------------------------------


def test_only_the_user_can_trust_the_code_of_a_model(tmp_path: Path, tinyllama: Any) -> None:
    marker = tmp_path / "ran"
    model = model_folder(tmp_path / "model", "remote_tokenizer", marker)
    metadata = {
        "model_class_name": "AutoModelForCausalLM",
        "hook_names": [f"model.layers.{block}" for block in BLOCKS],
        "model_from_pretrained_kwargs": TRUST,
    }
    sae = saved_sae(tmp_path / "sae", tinyllama, str(model), **metadata)
    line = error_line(call("eval", sae, *TEXT))
    assert "metadata.model_from_pretrained_kwargs: 'trust_remote_code' is not taken" in line
    assert "--trust-remote-code" in line and not marker.exists()

    saved_sae(sae, tinyllama, str(model), **{**metadata, "model_from_pretrained_kwargs": {}})
    error_line(call("eval", sae, *TEXT))
    assert not marker.exists()
    call("eval", sae, *TEXT, "--trust-remote-code")
    assert marker.read_text() == "ran"


def test_a_model_that_the_user_names_replaces_that_of_the_file(
    tmp_path: Path, tinyllama: Any
) -> None:
    marker = tmp_path / "ran"
    model = model_folder(tmp_path / "model", "known_type", marker)
    sae = saved_sae(tmp_path / "sae", tinyllama, str(model), model_from_pretrained_kwargs=TRUST)
    result = call("eval", sae, *TEXT, "--model-name", TINYLLAMA)
    assert result.exit_code == 0, result.output
    assert json.loads((sae / "eval.json").read_text())["ours"]["reconstruction"]["norm_mse"] > 0
    assert not marker.exists()
    line = error_line(call("eval", sae, *TEXT, "--model-name", "demo"))
    assert "width 64, the model has width 128" in line and str(model) in line


def test_a_model_that_the_user_names_must_have_the_blocks(tmp_path: Path, tinyllama: Any) -> None:
    blocks = [3, 5, 40]
    sae = saved_sae(
        tmp_path,
        tinyllama,
        "org/name",
        routed_blocks=blocks,
        hook_names=[f"blocks.{block}.hook_resid_post" for block in blocks],
        hook_name=routed_hook_name(40),
    )
    line = error_line(call("eval", sae, *TEXT, "--model-name", TINYLLAMA))
    assert "40" in line and "model_name='org/name'" in line


# --- payloads ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return good_files(tmp_path_factory.mktemp("good"))


@pytest.fixture
def hostile(
    good: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, str], Path]:
    """`hostile(kind, payload)`: a copy of a good folder, the working one, with a payload."""

    def make(kind: str, payload: str) -> Path:
        folder, marker = tmp_path / kind, tmp_path / "ran"
        for _ in range(2):  # the proof may change the files
            monkeypatch.chdir(tmp_path)
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(good[kind], folder)
            payloads(kind, good[kind])[payload](folder, marker)
            assert runs_when_executed(folder, marker)
        monkeypatch.chdir(folder)
        return folder

    return make


def read(kind: str, folder: Path, good: dict[str, Path], out: Path) -> Any:
    """What the command that reads a kind comes to."""
    commands = {
        "sae": ("eval", folder, *TEXT),
        "checkpoint": ("train", "--resume", folder),
        "text": ("eval", good["sae"], "--dataset", folder, "--max-tokens", 64),
        "dataset": ("train", *as_options({**RUN, "output_path": out}), "--dataset-path", folder),
        "features": ("interpret", folder),
        "config": ("train", "--config", folder / "run.yaml", "--output-path", out),
    }
    out.mkdir()
    return call(*commands[kind])


@pytest.mark.parametrize(
    ("kind", "payload", "message"),
    [
        ("sae", "pickle as cfg.json", "cfg.json: cannot be read as JSON"),
        ("sae", "torch.save as sae_weights.safetensors", "cannot be read as safetensors"),
        ("sae", "a model that asks for trust", "'trust_remote_code' is not taken from a file"),
        ("checkpoint", "pickle as run_state.json", "a file of the checkpoint: cannot be read"),
        ("checkpoint", "pickle as trainer_state.safetensors", "a file of the checkpoint"),
        ("checkpoint", "torch.save as activations_store_state.safetensors", "a file of the"),
        ("checkpoint", "a pointer to pickles", "a file of the checkpoint: cannot be read"),
        ("checkpoint", "a model that asks for trust", "--model-from-pretrained-kwargs"),
        ("checkpoint", "a model of pickles", "weights in other formats are not read"),
        ("checkpoint", "pickles by other names", None),
        ("text", "only a script", "holds no data files"),
        ("text", "only a pickle as rows.parquet", "cannot be read (ArrowInvalid"),
        ("text", "only a pickle as rows.pkl", "holds no data files"),
        ("text", "a script", None),
        ("dataset", "pickle as state.json", "cannot be read (UnicodeDecodeError"),
        ("dataset", "an extension type", None),
        ("features", "pickle as contexts.parquet", "cannot be read (ArrowInvalid"),
        ("features", "an extension type in features.parquet", None),
        ("config", "apply in run.yaml", "not YAML: could not determine a constructor"),
        ("config", "new in run.yaml", "not YAML: could not determine a constructor"),
    ],
)
def test_no_payload_runs(
    hostile: Callable[[str, str], Path],
    good: dict[str, Path],
    tmp_path: Path,
    kind: str,
    payload: str,
    message: str | None,
) -> None:
    """Refused with a message in one line, or read without what is added to a good folder."""
    result = read(kind, hostile(kind, payload), good, tmp_path / "out")
    if message is None:
        assert result.exit_code == 0, result.output
    else:
        assert message in error_line(result)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("payload", ["torch.save as RouteSAE.pt", "an object between weights"])
def test_no_object_in_a_checkpoint_of_the_papers_code_is_made(
    hostile: Callable[[str, str], Path], tmp_path: Path, payload: str
) -> None:
    file = hostile("reference", payload) / "RouteSAE.pt"
    with pytest.raises(UserError, match=r"RouteSAE.pt: cannot be read \(UnpicklingError"):
        SAE.load_from_disk(file, converter=reference_converter(4, routed_blocks=BLOCKS))
    assert not (tmp_path / "ran").exists()


def test_a_run_resumes_with_the_model_and_the_options_that_the_user_gives(
    hostile: Callable[[str, str], Path], tmp_path: Path
) -> None:
    folder = hostile("checkpoint", "a model of pickles")
    model = str(folder / "model")
    with pytest.raises(UserError, match=r"runner_cfg.json: model_name=.*--model-name"):
        resumed_config(folder, {})
    assert resumed_config(folder, {"model_name": model}).model_name == model

    folder = hostile("checkpoint", "a model that asks for trust")
    with pytest.raises(UserError, match="'trust_remote_code' is not taken from a file"):
        resumed_config(folder, {"model_name": model})
    assert not (tmp_path / "ran").exists()
    call("train", "--resume", folder, "--model-from-pretrained-kwargs", json.dumps(TRUST))
    assert (tmp_path / "ran").read_text() == "ran"
