"""The `cache` command: what it writes, and that `train` and `sweep` read it."""

from support.command_line import SMALL, as_options, call, error_line, write_yaml

from sae_lens_route.training.runner import RouteSAETrainingRunner


def test_what_cache_writes_train_and_sweep_read(tmp_path, monkeypatch):
    runs = {"runs": {"a": {"k": 4}, "b": {"k": 8}}, "output_path": str(tmp_path / "sweep")}
    fields = {**SMALL, "cache_activations": str(tmp_path / "cache")}
    file = write_yaml(tmp_path / "sweep.yaml", {**fields, **runs})
    result = call("cache", "--config", file)
    assert result.exit_code == 0, result.output
    assert "tokens x 9 blocks" in result.output and str(tmp_path / "cache") in result.output
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert {"cache.json", "shard-00000.safetensors"} <= written.keys()

    loaded = []
    load = RouteSAETrainingRunner._load_model
    monkeypatch.setattr(
        RouteSAETrainingRunner, "_load_model", lambda self: (loaded.append(1), load(self))[1]
    )
    result = call("train", *as_options(fields), "--output-path", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert not loaded
    result = call("sweep", "--config", file, "--eval-tokens", 64)
    assert result.exit_code == 0, result.output
    assert loaded == [1]  # for the evaluation alone
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()} == written


def test_without_a_folder_the_command_says_what_to_give(tmp_path):
    assert "--cache-activations: name a folder" in error_line(call("cache", *as_options(SMALL)))
