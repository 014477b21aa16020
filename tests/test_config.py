"""Configurations from Python, flat values and files, and their resolution against a model."""

import json
from pathlib import Path

import pytest
import yaml
from support.command_line import SMALL, write_yaml
from support.small import TINYLLAMA_WIDTH

from sae_lens_route import RouteSAERunnerConfig, RouteTopKTrainingSAEConfig, UserError
from sae_lens_route.config import (
    config_fields,
    lr_schedule_steps,
    read_config_file,
    runner_config,
    trainable_architectures,
)
from sae_lens_route.config_sweep import sweep_config
from sae_lens_route.training.entries import expand_runs

CONFIGS = Path(__file__).parents[1] / "examples" / "configs"


PAPERS = ["gpt2", "llama-3.2-1b-instruct", "pythia-160m"]


def test_every_configuration_file_that_ships_is_tried_here():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*PAPERS, "smollm2-135m"}


def test_the_configuration_of_smollm2():
    cfg = RouteSAERunnerConfig.from_file(CONFIGS / "smollm2-135m.yaml")
    assert (cfg.sae.d_in, cfg.sae.d_sae, cfg.sae.k) == (576, 8 * 576, 32)
    assert cfg.routed_blocks == list(range(6, 22))


@pytest.mark.parametrize("path", (CONFIGS / "sweeps").glob("*.yaml"), ids=lambda path: path.stem)
def test_sweeps_that_ship(path):
    cfg, runs, seeds = sweep_config(path)
    entries = expand_runs(runs, cfg.d_model, seeds)
    assert len(entries) == 3 * len(runs) and seeds == [0, 1, 2]
    k = {"smollm2-dictionaries": 32, "demo-dictionaries": 16}[path.stem]
    assert {entry.sae.k for entry in entries.values()} <= {k, k // 4}  # a quarter each
    assert cfg.output_path == f"runs/{path.stem}"


@pytest.mark.parametrize("path", [CONFIGS / f"{name}.yaml" for name in PAPERS], ids=PAPERS)
def test_configuration_files_with_the_papers_settings(path):
    cfg = RouteSAERunnerConfig.from_file(path)
    assert cfg.lr == 5e-4 and cfg.sae.k == 64 and cfg.sae.d_sae == 8 * cfg.sae.d_in
    assert cfg.total_training_steps == 100_000_000 // (64 * 512)
    assert cfg.routed_blocks == list(range(cfg.routed_blocks[0], cfg.routed_blocks[-1] + 1))


def test_overrides_take_precedence_over_the_file(tmp_path):
    file = write_yaml(tmp_path / "run.yaml", {**SMALL, "lr": "1e-3"})
    cfg = RouteSAERunnerConfig.from_file(file, k=4, output_path=tmp_path / "x", routed_blocks="2-5")
    assert (cfg.lr, cfg.sae.k, cfg.training_tokens) == (1e-3, 4, 640)
    assert cfg.output_path == str(tmp_path / "x")
    assert cfg.routed_blocks == [2, 3, 4, 5]


def test_json_is_read_as_yaml_is(tmp_path):
    file = tmp_path / "run.json"
    file.write_text(json.dumps(SMALL))
    assert RouteSAERunnerConfig.from_file(file).sae.k == 8


def test_sizes_default_to_the_models():
    cfg = runner_config({"model_name": "demo", "dataset_path": "demo", "context_size": 256})
    assert (cfg.sae.d_in, cfg.sae.d_sae) == (128, 1024)


def test_fields_go_to_their_part():
    cfg = runner_config({**SMALL, "dtype": "float64", "run_name": "x", "routing": "uniform"})
    assert cfg.dtype == cfg.sae.dtype == "float64"
    assert cfg.logger.run_name == "x" and not cfg.logger.log_to_wandb
    assert cfg.sae.routing == "uniform"


def test_fields_of_an_architecture_have_its_types():
    fields = {**SMALL, "d_in": 64, "k": 7.5}
    assert runner_config({**fields, "architecture": "route_batchtopk"}).sae.k == 7.5
    with pytest.raises(UserError, match=r"k=7\.5: must be int"):
        runner_config(fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"routed_layers": [3, 4]}, "unknown field 'routed_layers'; did you mean 'routed_blocks'?"),
        ({"kk": 3}, "unknown field 'kk'"),
        ({"hook_name": "blocks.3.hook_resid_post"}, "hook_name: is filled in"),
        ({"l1_coefficient": 0.1}, "architecture='route_topk' has no such field"),
        ({"architecture": "topk"}, "architecture='topk': must be one of route_topk, "),
        ({"k": True}, "k=True: must be int"),
        ({"k": None}, "k=None: must be int"),
        ({"routing": "softly"}, "routing='softly': must be one of hard, soft, uniform"),
        ({"routed_blocks": 3}, "routed_blocks=3: must be a list of int"),
        ({"routed_blocks": [4, 3]}, "must ascend"),
        ({"activations_mixing_fraction": 1.0}, r"must be in \[0, 1\)"),
        # checks of SAELens's own configuration classes
        ({"prefetch_llm_batches": -1}, "prefetch_llm_batches"),
        ({"seqpos_slice": [12, 1]}, "[Ss]eq"),
    ],
)
def test_mistakes_are_user_errors(changes, message):
    with pytest.raises(UserError, match=message):
        runner_config({**SMALL, "d_in": 64, **changes})


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_config_file(tmp_path / "no.yaml")
    for content, message in (("runs: [", "not YAML"), ("- 3", "must hold fields and values")):
        (tmp_path / "bad.yaml").write_text(content)
        with pytest.raises(UserError, match=message):
            read_config_file(tmp_path / "bad.yaml")


@pytest.mark.parametrize("architecture", trainable_architectures())
def test_resolving_fills_in_blocks_hooks_and_sizes(tinyllama, architecture):
    values = {name: value for name, value in SMALL.items() if name != "k"}
    cfg = runner_config({**values, "architecture": architecture, "routed_blocks": [2, 5, 9]})
    for _ in range(2):  # again without effect
        cfg.resolve(tinyllama)
        assert cfg.hook_names == [f"blocks.{block}.hook_resid_post" for block in (2, 5, 9)]
        assert cfg.sae.n_routed_layers == 3
        stacked = architecture.startswith("crosscoder")
        assert cfg.sae.d_in == (3 if stacked else 1) * TINYLLAMA_WIDTH
        kind = "stack" if stacked else "route"
        assert cfg.hook_name == f"blocks.9.{kind}.hook_resid_post"


def test_memory_grows_with_what_is_trained(tinyllama):
    def estimate(**changes):
        cfg = runner_config({**SMALL, **changes})
        cfg.resolve(tinyllama)
        return cfg.memory_estimate()

    one = estimate()
    assert estimate(d_sae=256)["features"] == 2 * one["features"]
    assert estimate(dtype="float64")["activations"] == 2 * one["activations"]
    cross = estimate(architecture="crosscoder_topk")
    assert cross["activations"] == one["activations"]
    assert cross["sae"] > 8 * one["sae"]
    assert estimate(architecture="multi_layer_topk")["features"] == 9 * one["features"]


def test_the_schedule_scales_with_the_run():
    assert lr_schedule_steps(3000) == (150, 600)
    cfg = runner_config({**SMALL, "d_in": 64, "training_tokens": 64 * 1000})
    assert (cfg.lr_warm_up_steps, cfg.lr_decay_steps) == (50, 200)


def test_a_configuration_written_as_yaml_is_read_back(tmp_path):
    cfg = runner_config({**SMALL, "d_in": 64, "output_path": tmp_path, "seqpos_slice": [1, 12]})
    fields = config_fields()
    flat = {**cfg.to_dict(), **cfg.sae.to_dict(), **cfg.logger.__dict__}
    known = {name for part in fields.values() for name in part}
    values = {name: value for name, value in flat.items() if name in known}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    unique = {"checkpoint_path"}  # SAELens appends a random folder
    again = RouteSAERunnerConfig.from_file(file).to_dict()
    assert {k: v for k, v in again.items() if k not in unique} == {
        k: v for k, v in cfg.to_dict().items() if k not in unique
    }


def test_defaults_are_the_papers():
    cfg = RouteSAERunnerConfig(sae=RouteTopKTrainingSAEConfig(d_in=2048, d_sae=16384))
    assert (cfg.sae.k, cfg.lr) == (64, 5e-4)
    assert (cfg.context_size, cfg.store_batch_size_prompts) == (512, 64)
    assert cfg.train_batch_size_tokens == 64 * 512
    assert (cfg.adam_beta1, cfg.adam_beta2) == (0.9, 0.999)
    steps = 100_000_000 // (64 * 512)
    assert (cfg.lr_warm_up_steps, cfg.lr_decay_steps) == (int(0.05 * steps), steps // 5)
    assert cfg.activations_mixing_fraction == 0
    assert not cfg.logger.log_to_wandb
