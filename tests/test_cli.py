"""The command line, as a user calls it: in a process of its own or through Typer's runner."""

import json
import subprocess
import sys

import pytest
import yaml
from small import TINYLLAMA
from typer.testing import CliRunner

from sae_lens_route.cli import app, runner_config

SMALL = {
    "model_name": TINYLLAMA,
    "dataset_path": "demo",
    "context_size": 16,
    "store_batch_size_prompts": 4,
    "training_tokens": 640,
    "d_sae": 128,
    "k": 8,
}


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def as_options(fields):
    return [
        part for name, value in fields.items() for part in (f"--{name.replace('_', '-')}", value)
    ]


def test_every_configuration_field_is_an_option_with_a_text():
    import dataclasses

    from sae_lens_route import RouteTopKTrainingSAEConfig
    from sae_lens_route.cli import _FILLED_IN, _options
    from sae_lens_route.runner import RouteSAERunnerConfig

    options = _options()
    for cls in (RouteSAERunnerConfig, RouteTopKTrainingSAEConfig):
        for field in dataclasses.fields(cls):
            assert field.name in options or field.name in _FILLED_IN
    without_text = {o.field for o in options.values() if not o.help and o.owner != "logger"}
    assert not without_text
    assert "--k " in call("train", "--help").output


def test_train_and_info(tmp_path):
    out = tmp_path / "run"
    result = call("train", *as_options(SMALL), "--output-path", out)
    assert result.exit_code == 0, result.output
    assert f"wrote {out}" in result.output
    shown = json.loads(call("info", out).stdout)
    assert shown["cfg"]["d_in"] == 64 and shown["weights"]["W_router"] == [64, 9]


def test_configuration_file_and_options_before_it(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**SMALL, "lr": "1e-3", "routed_layers": "2-5"}))
    result = call("train", "--config", file, "--k", 4, "--dry-run", "--output-path", tmp_path / "x")
    assert result.exit_code == 0, result.output
    plan = yaml.safe_load(result.stdout.split("\nsteps:")[0])
    assert plan["sae"]["k"] == 4
    assert plan["lr"] == 1e-3
    assert plan["routed_layers"] == [2, 3, 4, 5]
    assert plan["hook_name"] == "blocks.5.hook_resid_route"
    assert "steps: 10 of 64 tokens" in result.output
    assert "memory beside the language model" in result.output
    assert not (tmp_path / "x").exists()


def test_json_file(tmp_path):
    file = tmp_path / "run.json"
    file.write_text(json.dumps(SMALL))
    assert call("train", "--config", file, "--dry-run").exit_code == 0


def test_sizes_default_to_the_models():
    cfg = runner_config({"model_name": "demo", "dataset_path": "demo", "context_size": 256})
    assert (cfg.sae.d_in, cfg.sae.d_sae) == (128, 1024)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": "many"}, "k='many': must be int"),
        ({"k": 1000}, "k=1000"),
        ({"routed_layers": "3-40"}, "routed_layers"),
        ({"model_name": "./nowhere"}, "model_name='./nowhere'"),
        ({"model_name": "no-such-model"}, "model_name='no-such-model'"),
        ({"dataset_path": "./nowhere"}, "dataset_path='./nowhere'"),
        ({"d_in": 32}, "d_in=32"),
        ({"training_tokens": 10}, "training_tokens=10"),
        ({"streaming": "perhaps"}, "streaming='perhaps': must be bool"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(tmp_path, changes, message):
    fields = {**SMALL, "output_path": tmp_path / "run", **changes}
    result = call("train", *as_options(fields))
    assert result.exit_code == 2
    (line,) = [line for line in result.output.splitlines() if line.startswith("error:")]
    assert message in line
    assert not (tmp_path / "run").exists()


def test_other_mistakes(tmp_path):
    assert call("train", "--config", tmp_path / "no.yaml").exit_code == 2
    (tmp_path / "bad.yaml").write_text("kk: 3")
    result = call("train", "--config", tmp_path / "bad.yaml")
    assert result.exit_code == 2 and "unknown field 'kk'" in result.output
    assert call("info", tmp_path).exit_code == 2
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "cfg.json").write_text("{}")
    result = call("train", *as_options(SMALL), "--output-path", tmp_path / "run")
    assert result.exit_code == 2 and "already holds a run" in result.output


def test_the_installed_command_runs():
    command = [sys.executable, "-c", "from sae_lens_route.cli import app; app()", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "train" in result.stdout and "demo" in result.stdout


def test_eval(tmp_path):
    out = tmp_path / "run"
    call("train", *as_options(SMALL), "--output-path", out)
    result = call("eval", out, "--max-tokens", 256, "--batch-size", 4)
    assert result.exit_code == 0, result.output
    content = json.loads((out / "eval.json").read_text())
    assert content["dataset"] == "demo:heldout"
    assert content["ours"]["downstream"]["kl"] > 0
    assert content["saelens"]["model_behavior_preservation"]["kl_div_with_sae"] > 0
    assert f"wrote {out / 'eval.json'}" in result.output
    assert call("eval", tmp_path).exit_code == 2


def test_features_and_interpret(tmp_path):
    out = tmp_path / "run"
    call("train", *as_options(SMALL), "--output-path", out)
    small = ("--max-tokens", 1024, "--batch-size", 4, "--threshold", 0.2, "--also", 0.4)
    result = call("features", out, *small)
    assert result.exit_code == 0, result.output
    assert "threshold 0.200:" in result.output and "threshold 0.400:" in result.output
    folder = out / "features"
    assert {p.name for p in folder.iterdir()} >= {
        "features.parquet",
        "contexts.parquet",
        "contexts.json",
    }
    result = call("interpret", folder)
    assert result.exit_code == 0, result.output
    assert "not the paper's score" in (folder / "offline_ranking.json").read_text()
    assert call("features", out, *small).exit_code == 2  # already there
    assert call("interpret", tmp_path).exit_code == 2


def test_steer_and_dashboard(tmp_path):
    out = tmp_path / "run"
    call("train", *as_options(SMALL), "--output-path", out)
    written = tmp_path / "steered.json"
    size = ("--max-new-tokens", 4, "--output", written)
    result = call("steer", out, "def read(", "--edit", "3:set:5", "--edit", "4:ablate", *size)
    assert result.exit_code == 0, result.output
    assert json.loads(written.read_text())["prompt"] == "def read("
    for wrong in ("999:set:5", "3:push:5", "x"):
        assert call("steer", out, "def", "--edit", wrong).exit_code == 2, wrong
    result = call("dashboard", out, "--n-features", 2, "--max-tokens", 512)
    assert result.exit_code == 0, result.output
    assert (out / "dashboard.html").stat().st_size < 15e6
