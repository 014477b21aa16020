"""`sweep`, and what `reproduce` needs to be told."""

import json

import pytest
from support.command_line import SMALL, call, error_line, write_yaml

from sae_lens_route.evals.comparison import SweepResult

SWEEP = {
    **SMALL,
    "routed_blocks": "3-6",
    "runs": {
        "route": {"k": [4, 8]},
        "random": {"routing": "uniform"},
        "soft": {"routing": "soft", "blocks": "4-5"},
        "crosscoder": {"architecture": "crosscoder", "l1_coefficient": "3e-3", "blocks": [3, 6]},
        "topk": {"architecture": "topk", "blocks": [6], "d_sae": 96},
    },
    "seeds": [0, 1],
}


def test_sweep_trains_evaluates_and_draws(tmp_path):
    file, out = write_yaml(tmp_path / "sweep.yaml", SWEEP), tmp_path / "out"
    result = call("sweep", "--config", file, "--output-path", out, "--eval-tokens", 64)
    assert result.exit_code == 0, result.output
    rows = {row.name: row for row in SweepResult.read(out).rows}
    labels = {"route k=4", "route k=8", "random", "soft", "crosscoder", "topk"}
    assert rows.keys() == {f"{label} seed={seed}" for label in labels for seed in (0, 1)}
    # the file's k and d_sae apply to runs without them, if their architecture has the field
    given = {
        name: (row.settings.k, row.d_sae, row.settings.l1_coefficient) for name, row in rows.items()
    }
    assert given["random seed=0"] == (8, 128, None)
    assert given["topk seed=1"] == (8, 96, None)
    assert given["crosscoder seed=0"] == (None, 128, 0.003)
    assert rows["soft seed=0"].blocks == [4, 5] and rows["soft seed=0"].kl is None
    for name, row in rows.items():
        assert json.loads((out / name / "cfg.json").read_text())["d_sae"] == row.d_sae
        (line,) = [line for line in result.stdout.splitlines() if line.startswith(name)]
        assert f"{row.norm_mse:.4f}" in line
        metrics = row.reconstruction
        assert line.split()[-2:] == [str(metrics.dead_features), str(metrics.dense_features)]
    figures = [
        f"{metric}_by_l0.{kind}" for metric in ("norm_mse", "kl") for kind in ("html", "svg")
    ]
    for written in ("sweep.json", "sweep.csv", "sweep.parquet", *figures):
        assert (out / written).stat().st_size and f"wrote {out / written}" in result.stdout
    svg = (out / "norm_mse_by_l0.svg").read_text()
    assert all(f"<!-- {label} -->" in svg for label in SWEEP["runs"])
    assert "<!-- soft -->" not in (out / "kl_by_l0.svg").read_text()
    assert "already holds a run" in error_line(
        call("sweep", "--config", file, "--output-path", out)
    )


def test_one_architecture_for_all_runs_of_a_file(tmp_path):
    content = {**SMALL, "architecture": "crosscoder_topk", "runs": {"a": {}, "b": {"k": 4}}}
    file, out = write_yaml(tmp_path / "sweep.yaml", content), tmp_path / "out"
    result = call("sweep", "--config", file, "--output-path", out, "--eval-tokens", 64)
    assert result.exit_code == 0, result.output
    rows = SweepResult.read(out).rows
    assert [(row.architecture, row.settings.k) for row in rows] == [
        ("crosscoder_topk", 8),
        ("crosscoder_topk", 4),
    ]


def test_sweep_resumes_from_a_checkpoint(tmp_path):
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
    ours, theirs = (SweepResult.read(tmp_path / folder).rows for folder in "ab")
    for row, other in zip(ours, theirs, strict=True):
        assert row.norm_mse == pytest.approx(other.norm_mse, abs=1e-6), row.name
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
        ({"resume_from_checkpoint": "./no"}, "resume_from_checkpoint='./no': holds no whole"),
        ({"output_path": None}, "output_path: name a folder"),
    ],
)
def test_mistakes_in_a_sweep_end_in_one_line(tmp_path, changes, message):
    content = {**SWEEP, "runs": {"x": {}}, "seeds": [0], "output_path": str(tmp_path / "out")}
    file = write_yaml(tmp_path / "sweep.yaml", content | changes)
    assert message in error_line(call("sweep", "--config", file))
    assert not (tmp_path / "out").exists()


def test_other_mistakes_in_a_sweep(tmp_path):
    file = write_yaml(tmp_path / "sweep.yaml", {**SWEEP, "output_path": str(tmp_path / "out")})
    result = call("sweep", "--config", file, "--dataset", "./nowhere")
    assert "no such file or folder" in error_line(result)
    assert "no such file" in error_line(call("sweep", "--config", tmp_path / "no.yaml"))
    (tmp_path / "bad.yaml").write_text("runs: [")
    assert "not YAML" in error_line(call("sweep", "--config", tmp_path / "bad.yaml"))
    assert not (tmp_path / "out").exists()


def test_reproduce_says_what_is_missing(tmp_path):
    out = ("--output", tmp_path / "out")
    file = write_yaml(tmp_path / "run.yaml", {**SMALL, "dataset_path": "./text", "d_in": 64})
    assert "--dataset" in error_line(call("reproduce", "--config", file, *out))
    no_k = {name: value for name, value in SMALL.items() if name != "k"}
    file = write_yaml(tmp_path / "l1.yaml", {**no_k, "architecture": "route_standard"})
    assert "--k" in error_line(call("reproduce", "--config", file, *out))
    assert "none.md" in error_line(call("reproduce", "--page", tmp_path / "none.md", *out))
    assert not (tmp_path / "out").exists()
