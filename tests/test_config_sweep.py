"""The file of a sweep, read in Python."""

from support.command_line import SMALL, write_yaml

from sae_lens_route.config_sweep import sweep_config
from sae_lens_route.training.entries import expand_runs


def test_a_file_gives_the_run_the_settings_and_the_seeds(tmp_path):
    content = {
        **SMALL,
        "aux_loss_coefficient": 0.1,
        "runs": {
            "route": {"k": ["4", 8], "blocks": "4-5"},
            "crosscoder": {"architecture": "crosscoder", "l1_coefficient": "3e-3"},
        },
    }
    file = write_yaml(tmp_path / "sweep.yaml", content)
    cfg, runs, seeds = sweep_config(file, output_path=tmp_path, seed=7)
    assert (cfg.output_path, cfg.seed, seeds) == (str(tmp_path), 7, [7])
    shared = {"d_sae": 128, "device": "cpu", "dtype": "float32"}
    assert runs == {
        "route": {**shared, "k": [4, 8], "blocks": [4, 5], "aux_loss_coefficient": 0.1},
        # neither k nor the auxiliary loss: the architecture has no such fields
        "crosscoder": {**shared, "architecture": "crosscoder", "l1_coefficient": 3e-3},
    }
    entries = expand_runs(runs, cfg.d_model, seeds)
    assert list(entries) == ["route k=4", "route k=8", "crosscoder"]
