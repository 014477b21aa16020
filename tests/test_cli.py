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


# --- sweep ---------------------------------------------------------------------------------------

SWEEP = {
    **SMALL,
    "routed_layers": "3-6",
    "runs": {
        "route": {"k": [4, 8]},
        "random": {"routing": "uniform"},
        "soft": {"routing": "soft", "blocks": "4-5"},
        "crosscoder": {"architecture": "crosscoder", "l1_coefficient": "3e-3", "blocks": [3, 6]},
        "topk": {"architecture": "topk", "blocks": [6], "d_sae": 96},
    },
    "seeds": [0, 1],
}


def write_yaml(path, content):
    path.write_text(yaml.safe_dump(content))
    return path


def test_sweep_trains_evaluates_and_draws(tmp_path):
    file, out = write_yaml(tmp_path / "sweep.yaml", SWEEP), tmp_path / "out"
    result = call("sweep", "--config", file, "--output-path", out, "--eval-tokens", 64)
    assert result.exit_code == 0, result.output
    rows = {row["name"]: row for row in json.loads((out / "sweep.json").read_text())}
    labels = {"route k=4", "route k=8", "random", "soft", "crosscoder", "topk"}
    assert rows.keys() == {f"{label} seed={seed}" for label in labels for seed in (0, 1)}
    # the file's k and d_sae hold where a run has none of its own and its architecture has the field
    given = {name: (row["k"], row["d_sae"], row["l1_coefficient"]) for name, row in rows.items()}
    assert given["random seed=0"] == (8, 128, None)
    assert given["topk seed=1"] == (8, 96, None)
    assert given["crosscoder seed=0"] == (None, 128, 0.003)
    assert rows["soft seed=0"]["blocks"] == [4, 5] and "kl" not in rows["soft seed=0"]
    for name, row in rows.items():
        assert json.loads((out / name / "cfg.json").read_text())["d_sae"] == row["d_sae"]
        (line,) = [line for line in result.stdout.splitlines() if line.startswith(name)]
        assert f"{row['norm_mse']:.4f}" in line
    figures = [
        f"{metric}_by_l0.{kind}" for metric in ("norm_mse", "kl") for kind in ("html", "svg")
    ]
    for written in ("sweep.json", "sweep.csv", "sweep.parquet", *figures):
        assert (out / written).stat().st_size and f"wrote {out / written}" in result.stdout
    svg = (out / "norm_mse_by_l0.svg").read_text()
    assert all(f"<!-- {label} -->" in svg for label in SWEEP["runs"])
    assert "<!-- soft -->" not in (out / "kl_by_l0.svg").read_text()
    again = call("sweep", "--config", file, "--output-path", out)
    assert again.exit_code == 2 and "already holds a run" in again.output


def test_sweep_goes_on_from_a_checkpoint(tmp_path):
    file = write_yaml(
        tmp_path / "sweep.yaml",
        {**SWEEP, "seeds": [0], "n_checkpoints": 1, "output_path": "unused"},
    )
    size = ("--eval-tokens", 32)
    whole = call("sweep", "--config", file, "--output-path", tmp_path / "a", *size)
    assert whole.exit_code == 0, whole.output
    (checkpoint,) = (tmp_path / "a" / "checkpoints").glob("*/*")
    rest = call(
        "sweep", "--config", file, "--output-path", tmp_path / "b", *size,
        "--resume-from-checkpoint", checkpoint,
    )  # fmt: skip
    assert rest.exit_code == 0, rest.output
    ours, theirs = (json.loads((tmp_path / x / "sweep.json").read_text()) for x in "ab")
    for row, other in zip(ours, theirs, strict=True):
        assert row["norm_mse"] == pytest.approx(other["norm_mse"], abs=1e-6), row["name"]
    assert not (tmp_path / "unused").exists()


def test_sweep_shows_what_it_would_train(tmp_path):
    file = write_yaml(tmp_path / "sweep.yaml", {**SWEEP, "output_path": str(tmp_path / "x")})
    result = call("sweep", "--config", file, "--dry-run")
    assert result.exit_code == 0, result.output
    lines = {line.split("  ")[0]: line.split() for line in result.stdout.splitlines()}
    assert lines["route k=4 seed=1"][3:] == [
        "route_topk", "k=4", "128", "3", "4", "5", "6", "1", f"{2 * 64 * 128 + 192 + 4 * 64:,}"
    ]  # fmt: skip
    assert lines["soft seed=0"][2:7] == ["route_topk", "k=8", "128", "4", "5"]
    assert "steps: 10 of 64 tokens" in result.stdout
    assert "saes" in result.stdout and "GB on cpu" in result.stdout
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": {}}, "runs: name at least one dictionary"),
        ({"runs": None}, "runs: name at least one dictionary"),
        ({"runs": {"x": 3}}, "run 'x' of the sweep: 3 must be fields and values"),
        ({"runs": {"x": {"architecture": "no"}}}, "run 'x' of the sweep: architecture='no'"),
        ({"runs": {"x": {"kk": 3}}}, "run 'x' of the sweep: unknown field 'kk'"),
        ({"runs": {"x": {"k": "many"}}}, "run 'x' of the sweep: k='many': must be int"),
        ({"runs": {"x": {"k": [4, "many"]}}}, "run 'x' of the sweep: k='many': must be int"),
        ({"runs": {"x": {"k": 1000}}}, "run 'x' of the sweep: k=1000: must be between"),
        ({"runs": {"x": {"blocks": [3, 9]}}}, "entry 'x': blocks=[3, 9] must ascend"),
        ({"runs": {"x": {"blocks": 3}}}, "run 'x' of the sweep: blocks=3: must be a list"),
        ({"runs": {"x": {"architecture": "topk"}}}, "entry 'x': 'topk' has no router"),
        ({"runs": {"a/b": {}}}, "entry 'a/b': its name is that of a folder"),
        ({"seeds": 3}, "seeds=3: must be a list of int"),
        ({"seeds": []}, "seeds=[]: give at least one"),
        ({"kk": 3}, "unknown field 'kk'"),
        ({"k": [4, 8]}, "k=[4, 8]: must be int"),
        ({"dataset_path": "./nowhere"}, "--dataset: name held-out text"),
        ({"resume_from_checkpoint": "./no"}, "resume_from_checkpoint='no': holds no whole"),
        ({"output_path": None}, "output_path: name a folder"),
    ],
)
def test_mistakes_in_a_sweep_end_in_one_line(tmp_path, changes, message):
    content = {**SWEEP, "runs": {"x": {}}, "seeds": [0], "output_path": str(tmp_path / "out")}
    file = write_yaml(tmp_path / "sweep.yaml", content | changes)
    result = call("sweep", "--config", file)
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("error:")]
    assert message in line
    assert not (tmp_path / "out").exists()


def test_other_mistakes_in_a_sweep(tmp_path):
    file = write_yaml(tmp_path / "sweep.yaml", {**SWEEP, "output_path": str(tmp_path / "out")})
    result = call("sweep", "--config", file, "--dataset", "./nowhere")
    assert result.exit_code == 2 and "no such file or folder" in result.output
    assert call("sweep", "--config", tmp_path / "no.yaml").exit_code == 2
    (tmp_path / "bad.yaml").write_text("runs: [")
    result = call("sweep", "--config", tmp_path / "bad.yaml")
    assert result.exit_code == 2 and "not YAML" in result.output
    assert not (tmp_path / "out").exists()


def test_another_architecture(tmp_path):
    out = tmp_path / "run"
    fields = {**SMALL, "architecture": "route_batchtopk", "topk_threshold_lr": 0.1}
    result = call("train", *as_options(fields), "--output-path", out)
    assert result.exit_code == 0, result.output
    shown = json.loads(call("info", out).stdout)
    assert shown["cfg"]["architecture"] == "route_jumprelu"
    assert shown["cfg"]["metadata"]["training_architecture"] == "route_batchtopk"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "topk"}, "architecture='topk': must be one of route_topk"),
        ({"l1_coefficient": 0.1}, "l1_coefficient: architecture='route_topk' has no such field"),
        ({"router_objective": "assign"}, "router_objective='assign': must be one of"),
    ],
)
def test_mistakes_about_architectures(tmp_path, fields, message):
    result = call("train", *as_options({**SMALL, **fields}), "--output-path", tmp_path / "run")
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize("name", ["llama-3.2-1b-instruct", "pythia-160m", "gpt2"])
def test_configuration_files_that_ship(name):
    from pathlib import Path

    from sae_lens_route.cli import _read_config_file

    file = Path(__file__).parents[1] / "examples" / "configs" / f"{name}.yaml"
    cfg = runner_config(_read_config_file(file))
    assert cfg.lr == 5e-4 and cfg.sae.k == 64 and cfg.sae.d_sae == 8 * cfg.sae.d_in
    assert cfg.total_training_steps == 100_000_000 // (64 * 512)


def test_reproduce_says_what_is_missing(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**SMALL, "d_in": 64}))
    result = call("reproduce", "--config", file, "--output", tmp_path / "out")
    assert result.exit_code == 2 and "--dataset" in result.stderr
    result = call("reproduce", "--page", tmp_path / "none.md", "--output", tmp_path / "out")
    assert result.exit_code == 2 and "none.md" in result.stderr
