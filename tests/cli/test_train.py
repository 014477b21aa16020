"""`train`: its options are the configuration's fields, and every architecture it lists trains."""

import dataclasses
import json

import pytest
import yaml
from support.command_line import SMALL, as_options, call, error_line, write_yaml

from sae_lens_route.config import RouteSAERunnerConfig, config_fields, trainable_architectures
from sae_lens_route.config_fields import FILLED_IN

QUADRATIC = {"jumprelu_sparsity_loss_mode": "quadratic"}
ARCHITECTURES = list(trainable_architectures())


def test_every_configuration_field_is_an_option_with_a_text():
    shown = call("train", "--help").output
    options = {word for word in shown.replace("│", " ").split() if word.startswith("--")}
    for cls in (RouteSAERunnerConfig, *trainable_architectures().values()):
        for field in dataclasses.fields(cls):
            name = f"--{field.name.replace('_', '-')}"
            # long names are cut at the width of the terminal
            known = name in options or any(
                o.endswith("…") and name.startswith(o[:-1]) for o in options
            )
            assert known != (field.name in FILLED_IN), name
    texts: dict[str, str] = {}
    for architecture in ARCHITECTURES:
        for part in ("runner", "sae"):
            for name, field in config_fields(architecture)[part].items():
                texts.setdefault(name, field.help)
    assert all(texts.values()), [name for name, text in texts.items() if not text]


def test_train_and_info(tmp_path):
    out = tmp_path / "run"
    result = call("train", *as_options(SMALL), "--output-path", out)
    assert result.exit_code == 0, result.output
    assert f"wrote {out}" in result.output
    shown = json.loads(call("info", out).stdout)
    assert shown["cfg"]["d_in"] == 64 and shown["weights"]["W_router"] == [64, 9]


def test_options_override_the_configuration_file(tmp_path):
    file = write_yaml(tmp_path / "run.yaml", {**SMALL, "lr": "1e-3", "routed_blocks": "2-5"})
    result = call("train", "--config", file, "--k", 4, "--dry-run", "--output-path", tmp_path / "x")
    assert result.exit_code == 0, result.output
    plan = yaml.safe_load(result.stdout.split("\nsteps:")[0])
    assert plan["sae"]["k"] == 4
    assert plan["lr"] == 1e-3
    assert plan["routed_blocks"] == [2, 3, 4, 5]
    assert plan["hook_name"] == "blocks.5.route.hook_resid_post"
    assert "steps: 10 of 64 tokens" in result.output
    assert "memory, excluding the language model" in result.output
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_listed_architecture_trains_loads_and_evaluates(tmp_path, architecture):
    out = tmp_path / "run"
    has_k = "k" in config_fields(architecture)["sae"]
    fields = {name: value for name, value in SMALL.items() if name != "k" or has_k}
    result = call(
        "train", *as_options(fields), "--architecture", architecture, "--output-path", out
    )
    assert result.exit_code == 0, result.output
    result = call("eval", out, "--max-tokens", 256, "--batch-size", 4)
    assert result.exit_code == 0, result.output
    content = json.loads((out / "eval.json").read_text())
    assert 0 < content["ours"]["reconstruction"]["norm_mse"] < 5
    assert content["ours"]["downstream"]["kl"] > 0
    metadata = json.loads(call("info", out).stdout)["cfg"]["metadata"]
    assert metadata["training_architecture"] == architecture
    assert metadata["routed_blocks"] == list(range(3, 12))
    kind = "stack" if architecture.startswith("crosscoder") else "route"
    assert metadata["hook_name"] == f"blocks.11.{kind}.hook_resid_post"


def test_an_architecture_saved_as_another(tmp_path):
    out = tmp_path / "run"
    fields = {**SMALL, "architecture": "route_batchtopk", "topk_threshold_lr": 0.1}
    assert call("train", *as_options(fields), "--output-path", out).exit_code == 0
    assert json.loads(call("info", out).stdout)["cfg"]["architecture"] == "route_jumprelu"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": "many"}, "k='many': must be int"),
        ({"k": 1000}, "k=1000"),
        ({"routed_blocks": "3-40"}, "routed_blocks"),
        ({"model_name": "./nowhere"}, "model_name='./nowhere'"),
        ({"model_name": "no-such-model"}, "model_name='no-such-model'"),
        ({"dataset_path": "./nowhere"}, "dataset_path='./nowhere'"),
        ({"d_in": 32}, "d_in=32"),
        ({"training_tokens": 10}, "training_tokens=10"),
        ({"streaming": "perhaps"}, "streaming='perhaps': must be bool"),
        ({"architecture": "topk"}, "architecture='topk': must be one of route_topk"),
        ({"l1_coefficient": 0.1}, "l1_coefficient: architecture='route_topk' has no such field"),
        ({"router_objective": "assign"}, "router_objective='assign': must be one of"),
        ({"resume_from_checkpoint": "./no"}, "resume_from_checkpoint='./no'"),
        ({"device": "nowhere"}, "device='nowhere': torch cannot use it"),
        ({"dtype": "float33"}, "dtype='float33': must be one of float32"),
        ({"from_pretrained_path": "./no"}, "no"),
        # SAELens checks these when it builds the SAE
        ({"architecture": "route_jumprelu", "k": None, "target_l0": -1, **QUADRATIC}, "target_l0"),
        ({"architecture": "route_matryoshka_batchtopk", "matryoshka_widths": "[64, 32]"}, "width"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(tmp_path, changes, message):
    fields = {**SMALL, "output_path": tmp_path / "run", **changes}
    fields = {name: value for name, value in fields.items() if value is not None}
    assert message in error_line(call("train", *as_options(fields)))
    assert not (tmp_path / "run").exists()


def test_other_mistakes(tmp_path):
    assert "no such file" in error_line(call("train", "--config", tmp_path / "no.yaml"))
    file = write_yaml(tmp_path / "bad.yaml", {"kk": 3})
    assert "unknown field 'kk'" in error_line(call("train", "--config", file))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "cfg.json").write_text("{}")
    result = call("train", *as_options(SMALL), "--output-path", tmp_path / "run")
    assert "already holds a run" in error_line(result)
