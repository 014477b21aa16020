"""`train --resume` and `--extend`."""

import json

from support.command_line import SMALL, as_options, call, error_line


def test_a_run_is_extended_from_its_folder_alone(tmp_path):
    out = tmp_path / "run"
    assert call("train", *as_options(SMALL), "--output-path", out).exit_code == 0
    assert "its run is finished" in error_line(call("train", "--resume", out))
    result = call("train", "--resume", out, "--extend", 1280)
    assert result.exit_code == 0, result.output
    assert f"wrote {out}" in result.output
    last = json.loads((out / "train_log.jsonl").read_text().splitlines()[-1])
    assert (last["step"], last["tokens"]) == (20, 1280)
    assert json.loads((out / "runner_cfg.json").read_text())["training_tokens"] == 1280


def test_mistakes_end_in_one_line(tmp_path):
    assert "name the folder of the run with --resume" in error_line(call("train", "--extend", 9))
    assert "holds no whole checkpoint" in error_line(call("train", "--resume", tmp_path))
    config = tmp_path / "run.yaml"
    result = call("train", "--resume", tmp_path, "--config", config)
    assert "--resume takes the run's own configuration" in error_line(result)
