"""Commands on a saved SAE."""

import json
import re
from pathlib import Path

import pytest
from support.command_line import SMALL, as_options, call, error_line
from support.feature_tables import plain_table
from support.judge import good_answer

from sae_lens_route.features.judge_results import JudgeResult, ResultsFile
from sae_lens_route.features.raters import write_sheet
from sae_lens_route.features.table import FeatureTable


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a small RouteSAE."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    result = call("train", *as_options(SMALL), "--output-path", folder)
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="module")
def crosscoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crosscoder") / "run"
    fields = {**SMALL, "architecture": "crosscoder_topk", "output_path": folder}
    assert call("train", *as_options(fields)).exit_code == 0
    return folder


@pytest.fixture(scope="module")
def features(saved):
    """The folder that `features` writes."""
    small = ("--max-tokens", 1024, "--batch-size", 4, "--threshold", 0.2, "--also", 0.4)
    result = call("features", saved, *small)
    assert result.exit_code == 0, result.output
    assert "threshold 0.200:" in result.output and "threshold 0.400:" in result.output
    assert "dense features" in result.output and "the features to look at first" in result.output
    assert "already holds" in error_line(call("features", saved, *small))
    return saved / "features"


def page_data(path: Path) -> dict:
    """The numbers embedded in a page."""
    (data,) = re.findall(
        r'<script[^>]*type="application/json"[^>]*>(.*?)</script>', path.read_text(), re.S
    )
    return json.loads(data)


def test_eval(saved, tmp_path):
    output = tmp_path / "eval.json"
    result = call("eval", saved, "--max-tokens", 256, "--batch-size", 4, "--output", output)
    assert result.exit_code == 0, result.output
    content = json.loads(output.read_text())
    assert content["dataset"] == "demo:heldout"
    assert content["ours"]["downstream"]["kl"] > 0
    assert content["saelens"]["model_behavior_preservation"]["kl_div_with_sae"] > 0
    assert f"wrote {output}" in result.output


def test_two_judges_are_compared(tmp_path):
    table = plain_table(4)
    table.to_parquet(tmp_path / "features")
    with ResultsFile(tmp_path / "features" / "judge.jsonl") as file:
        for feature in range(4):
            asked = ("{}", "judge", "0", 1, None, None)
            file.append(JudgeResult(feature, "valid", *good_answer(feature), *asked))
    sheet = tmp_path / "mine.csv"
    write_sheet(table, range(4), sheet)
    filled = sheet.read_text(encoding="utf-8-sig").splitlines(keepends=True)
    for feature, score in enumerate((1, 2, 3, 5)):
        row = next(i for i, line in enumerate(filled) if line.startswith(f"{feature},"))
        filled[row] = filled[row].replace(f"{feature},,,", f"{feature},high-level,{score},", 1)
    sheet.write_text("".join(filled), encoding="utf-8")
    result = call("interpret", tmp_path / "features", "--agreement", sheet)
    assert result.exit_code == 0, result.output
    numbers = json.loads(result.output[: result.output.rindex("}") + 1])
    assert (numbers["n"], numbers["exact"], numbers["within_one"]) == (4, 0.75, 1.0)
    figure = tmp_path / "features" / "agreement.svg"
    assert f"wrote {figure}" in result.output
    assert "4 features scored by two judges: 75% equal, 100% within one" in figure.read_text()
    missing = call("interpret", tmp_path / "features", "--agreement", tmp_path / "no.csv")
    assert "no such file" in error_line(missing)


def test_features_and_interpret(features):
    assert {path.name for path in features.iterdir()} >= {
        "features.parquet",
        "contexts.parquet",
        "contexts.json",
    }
    result = call("interpret", features)
    assert result.exit_code == 0, result.output
    assert "not the paper's score" in (features / "surface_ranking.json").read_text()


def test_reference_rules_need_a_threshold(saved, tmp_path):
    result = call("features", saved, "--reference", "--output", tmp_path / "out")
    assert "--threshold" in error_line(result)


def test_steer(saved, tmp_path):
    written = tmp_path / "steered.json"
    size = ("--max-new-tokens", 4, "--output", written)
    result = call("steer", saved, "def read(", "--edit", "3:set:5", "--edit", "4:ablate", *size)
    assert result.exit_code == 0, result.output
    assert json.loads(written.read_text())["prompt"] == "def read("
    for wrong in ("999:set:5", "3:push:5", "x"):
        error_line(call("steer", saved, "def", "--edit", wrong))


def test_units_of_activations(saved, features, tmp_path):
    """n(x) unless asked otherwise, and x_route under the paper's rules."""
    table = FeatureTable.from_parquet(features)
    assert table.run.options.units == "n(x)"
    maxima, written = table.features["max_activation"].to_numpy(), tmp_path / "steered.json"
    edit = f"{maxima.argmax()}:set:1.5x"
    arguments = ("steer", saved, "def", "--edit", edit, "--features", features)
    result = call(*arguments, "--max-new-tokens", 2, "--output", written)
    assert result.exit_code == 0, result.output
    steered = json.loads(written.read_text())
    assert steered["units"] == "n(x)"
    assert steered["edits"][0]["value"] == pytest.approx(1.5 * maxima.max())
    assert "is in units of n(x)" in error_line(call(*arguments, "--units", "x_route"))
    for units in ("x_route", "n(x)"):
        output = tmp_path / units
        options = ("--reference", "--threshold", 0.2, "--max-tokens", 256, "--output", output)
        more = () if units == "x_route" else ("--units", units)
        assert call("features", saved, *options, *more).exit_code == 0
        assert FeatureTable.from_parquet(output).run.options.units == units


def test_dashboard(saved, tmp_path):
    output = tmp_path / "page.html"
    size = ("--n-features", 2, "--max-tokens", 512)
    result = call("dashboard", saved, *size, "--units", "x_route", "--output", output)
    assert result.exit_code == 0, result.output
    assert page_data(output)["units"] == "x_route"
    assert output.stat().st_size < 15e6


def test_dashboard_shows_contexts_and_scores_of_a_features_folder(saved, features, tmp_path):
    size = ("--n-features", 3, "--max-tokens", 512)
    assert call("interpret", features).exit_code == 0
    ranking = json.loads((features / "surface_ranking.json").read_text())["features"]
    scores = {row["feature"]: row["score"] for row in ranking}
    output = tmp_path / "surface.html"
    result = call("dashboard", saved, "--features", features, *size, "--output", output)
    assert result.exit_code == 0, result.output
    shown = {each["feature"]: each["score"] for each in page_data(output)["features"]}
    assert len(shown) == 3
    for feature, score in shown.items():
        assert score == (
            None if scores[feature] is None else pytest.approx(scores[feature], rel=1e-3)
        )

    feature = next(iter(shown))
    replies = [
        JudgeResult(feature, "valid", "low-level", 4, "why", "{}", "judge", "0", 1, None, None)
    ]
    lines = [json.dumps(reply._asdict()) + "\n" for reply in replies]
    (features / "judge.jsonl").write_text("".join(lines))
    output = tmp_path / "judged.html"
    result = call("dashboard", saved, "--features", features, *size, "--output", output)
    assert result.exit_code == 0, result.output
    shown = {each["feature"]: each["score"] for each in page_data(output)["features"]}
    assert shown[feature] == 4


def test_a_folder_without_what_a_command_reads(saved, tmp_path):
    for command in ("eval", "features", "dashboard", "info"):
        assert "no cfg.json there" in error_line(call(command, tmp_path))
    assert "no cfg.json there" in error_line(call("steer", tmp_path, "def", "--edit", "3:set:5"))
    assert "no features.parquet" in error_line(call("interpret", tmp_path))
    result = call("dashboard", saved, "--features", tmp_path)
    assert "no features.parquet" in error_line(result)
    (tmp_path / "cfg.json").write_text("{}")
    assert "no sae_weights.safetensors" in error_line(call("info", tmp_path))


def test_a_plain_saelens_sae_is_refused_by_name(tmp_path):
    from sae_lens import TopKSAE, TopKSAEConfig

    TopKSAE(TopKSAEConfig(d_in=8, d_sae=16, k=2)).save_model(tmp_path)
    assert "a topk SAE, not a RouteSAE" in error_line(call("eval", tmp_path))
    assert call("info", tmp_path).exit_code == 0


def test_crosscoders_are_refused_where_routes_are_needed(crosscoder):
    for arguments in (("features",), ("dashboard",), ("steer",)):
        more = ("def", "--edit", "3:set:5") if arguments == ("steer",) else ()
        line = error_line(call(*arguments, crosscoder, *more))
        assert "crosscoder" in line and f"`{arguments[0]}`" in line and "`eval`" in line


def test_an_unknown_device(saved):
    line = error_line(call("eval", saved, "--device", "nowhere"))
    assert "device='nowhere': torch cannot use it" in line


def test_text_must_be_named_for_other_corpora(saved, tmp_path):
    for name in ("cfg.json", "sae_weights.safetensors"):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    content = json.loads((tmp_path / "cfg.json").read_text())
    content["metadata"]["dataset_path"] = "some/corpus"
    (tmp_path / "cfg.json").write_text(json.dumps(content))
    line = error_line(call("eval", tmp_path))
    assert "--dataset" in line and "'some/corpus'" in line
