"""The command `concepts` on SAEs that were trained a few steps: files, tables and mistakes."""

import json
import random

import pytest
from support.command_line import SMALL, as_options, call, error_line, write_yaml

from sae_lens_route.evals.comparison import SweepResult
from sae_lens_route.evals.concepts import ConceptRecovery

WORDS = [("the", "DET"), ("cat", "NOUN"), ("dog", "NOUN"), ("sees", "VERB"), ("eats", "VERB")]


def write_conllu(path, seed, documents=4, sentences=8):
    draw = random.Random(seed)
    lines = []
    for document in range(documents):
        lines.append(f"# newdoc id = {('weblog', 'email')[document % 2]}-{seed}-{document}")
        for _ in range(sentences):
            words = draw.choices(WORDS, k=6)
            lines.append("# text = " + " ".join(form for form, _ in words))
            for i, (form, tag) in enumerate(words, 1):
                lines.append("\t".join([str(i), form, form, tag, "_", "_", "0", "dep", "_", "_"]))
            lines.append("")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def annotated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("annotated")
    return [write_conllu(folder / f"{name}.conllu", i) for i, name in enumerate(("dev", "test"))]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    runs = {
        "RouteSAE": {},
        "TopK": {"blocks": [5]},
        "half, block 3": {"blocks": [3], "d_sae": 32},
        "half, block 5": {"blocks": [5], "d_sae": 32},
        "MLSAE": {"architecture": "multi_layer_topk"},
        "Crosscoder": {"architecture": "crosscoder_topk"},
    }
    file = write_yaml(folder / "sweep.yaml", {**SMALL, "runs": runs, "seeds": [0, 1]})
    result = call("sweep", "--config", file, "--output-path", folder / "run", "--eval-tokens", 64)
    assert result.exit_code == 0, result.output
    return folder / "run"


def test_a_sweep_is_compared_over_seeds(sweep, annotated, tmp_path):
    dev, test = annotated
    result = call("concepts", sweep, "--dev", dev, "--test", test, "--output", tmp_path, "--probes")
    assert result.exit_code == 0, result.output
    scores = ConceptRecovery.from_dict(json.loads((tmp_path / "concepts.json").read_text()))
    labels = ["RouteSAE", "TopK", "half, block 3", "half, block 5", "MLSAE", "Crosscoder"]
    seeds = [f"{label} seed={seed}" for label in labels for seed in (0, 1)]
    baselines = [name for name in scores.dictionaries if name not in seeds]
    assert [name.split(",")[0] for name in baselines] == ["stream", "PCA", "random directions"]
    assert list(scores.dictionaries["TopK seed=0"].levels) == ["word", "part of speech", "document"]
    assert set(scores.dictionaries["TopK seed=0"].overall.probe_f1) == {1, 5}

    lines = {line[:20].split("  ")[0]: line for line in result.output.splitlines()}
    values = [scores.dictionaries[f"TopK seed={seed}"].overall.f1 for seed in (0, 1)]
    assert f"{sum(values) / 2:.3f} ±" in lines["TopK"]
    for name in ("RouteSAE", "MLSAE", "Crosscoder", "permuted labels"):
        assert name in lines
    for name in ("concepts.json", "recovery.svg", "recovery.html"):
        assert f"wrote {tmp_path / name}" in result.output and (tmp_path / name).exists()


def test_a_multi_layer_sae_is_read_at_all_blocks(sweep, annotated, tmp_path):
    dev, test = annotated
    page = tmp_path / "page.md"
    page.write_text(f"<!-- table: {tmp_path.name} --><!-- /table -->\n")
    options = ("--dev", dev, "--test", test, "--no-baselines", "--output", tmp_path)
    assert call("concepts", sweep, *options, "--page", page).exit_code == 0
    assert "| MLSAE |" in page.read_text() and "| permuted labels |" in page.read_text()
    scores = json.loads((tmp_path / "concepts.json").read_text())["dictionaries"]
    multi, routed = (scores[f"{label} seed=0"] for label in ("MLSAE", "RouteSAE"))
    # the largest over L blocks is above 0 at more tokens than the activation at one of them
    assert multi["dense_features"] > routed["dense_features"]


def test_single_layers_are_read_together(sweep, annotated, tmp_path):
    dev, test = annotated
    options = ("--dev", dev, "--test", test, "--no-baselines", "--output", tmp_path)
    result = call("concepts", sweep, *options, "--together", "half, ")
    assert result.exit_code == 0, result.output
    scores = json.loads((tmp_path / "concepts.json").read_text())["dictionaries"]
    union = scores["half seed=1"]
    assert union["n_features"] == 64
    assert {block for c in union["concepts"] for block in c["share_by_block"]} == {"3", "5"}
    rows = SweepResult.read(sweep).rows
    norm_mse = [row.norm_mse for row in rows if row.label == "RouteSAE"]
    line, _ = (line for line in result.output.splitlines() if line.startswith("RouteSAE"))
    assert f"{sum(norm_mse) / 2:.3f} ±" in line
    line, _ = (line for line in result.output.splitlines() if line.startswith("half"))
    assert line.split()[1:3] == ["-", "-"]
    message = error_line(call("concepts", sweep, *options, "--together", "quarter"))
    assert "--together='quarter'" in message and "'half, block 3'" in message


def test_python_source_has_labels_of_its_own(tmp_path):
    fields = {**SMALL, "model_name": "demo", "context_size": 32, "training_tokens": 1280}
    assert call("train", *as_options(fields), "--output-path", tmp_path / "run").exit_code == 0
    options = ("--python", "--max-characters", 30_000, "--no-baselines")
    result = call("concepts", tmp_path / "run", *options)
    assert result.exit_code == 0, result.output
    scores = json.loads((tmp_path / "run" / "concepts" / "concepts.json").read_text())
    assert {"token", "kind", "context"} <= set(scores["dictionaries"]["run"]["levels"])


def test_mistakes(sweep, annotated, tmp_path):
    dev, test = annotated
    either = "either --dev (and --test), or --python"
    assert either in error_line(call("concepts", sweep))
    assert either in error_line(call("concepts", sweep, "--python", "--dev", dev))
    assert "no cfg.json there" in error_line(call("concepts", tmp_path, "--dev", dev))
    assert "no.conllu" in error_line(call("concepts", sweep, "--dev", tmp_path / "no.conllu"))
    twice = call("concepts", sweep, sweep, "--dev", dev, "--test", test)
    assert "share a name" in error_line(twice)
