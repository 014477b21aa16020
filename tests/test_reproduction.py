"""The reproduction: its statistics against other computations, its tables, and a small real run."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from small import small_config

from sae_lens_route.report import (
    ASSIGNMENT,
    ATTENTION,
    DIFFERENCES,
    MEAN,
    PLAIN_MSE,
    ROUTE,
    ROUTERS,
    SHOWN,
    at_shares,
    fill_tables,
    interval,
    routing_gain,
    tables,
)
from sae_lens_route.reproduction import Reproduction, main_runs, reproduce
from sae_lens_route.sweep import expand_runs


def test_interval_is_students() -> None:
    values = [0.173, 0.177, 0.168]
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    found = interval(values)
    assert found.mean == pytest.approx(np.mean(values), rel=1e-12)
    assert found.mean - found.half_width == pytest.approx(low, rel=1e-9)
    assert found.mean + found.half_width == pytest.approx(high, rel=1e-9)
    assert interval([0.5]).half_width is None
    assert str(interval([0.5])) == "0.500"


def test_routing_gain_pairs_seeds() -> None:
    router = [{"seed": 0, "kl": 0.9}, {"seed": 1, "kl": 0.6}]
    random = [{"seed": 1, "kl": 1.0}, {"seed": 0, "kl": 1.0}]
    assert routing_gain(router, random, "kl").mean == pytest.approx((0.1 + 0.4) / 2)
    with pytest.raises(ValueError, match=r"\[0\]"):
        routing_gain(router, random[1:], "kl")


def test_a_router_at_other_shares() -> None:
    row = {"norm_mse_by_layer": [0.1, None, 0.3]}
    assert at_shares(row, [0.5, 0.0, 0.5], "norm_mse") == pytest.approx(0.2)
    assert at_shares(row, [0.5, 0.1, 0.4], "norm_mse") is None


def test_tables_go_between_their_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "a\n<!-- table: one -->old\nold<!-- /table -->\nb <!-- table: two --><!-- /table -->"
    )
    fill_tables(page, {"one": "| 1 |", "two": "| 2 |"})
    once = page.read_text()
    assert "old" not in once and "| 1 |" in once and once.startswith("a\n")
    fill_tables(page, {"one": "| 1 |", "two": "| 2 |"})
    assert page.read_text() == once
    with pytest.raises(ValueError, match="'two'"):
        fill_tables(page, {"one": ""})


def test_every_method_is_known_to_saelens() -> None:
    runs = {name: {"d_sae": 128, **run} for name, run in main_runs(8, 64, 11, 100).items()}
    entries = expand_runs(runs, 64, [0])
    assert len(entries) == len(main_runs(8, 64, 11, 100))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Reproduction, dict[str, Any]]:
    """Every method on the tiny Llama, two seeds, a dozen steps."""
    output = tmp_path_factory.mktemp("reproduction")
    cfg = small_config(output, sae={"d_sae": 128, "k": 8}, training_tokens=16 * 4 * 12)
    what = Reproduction(
        cfg=cfg,
        k=8,
        other_ks=(4,),
        seeds=(0, 1),
        eval_dataset="demo:heldout",
        eval_tokens=128,
        feature_tokens=512,
        output=output,
    )
    return what, reproduce(what)


def test_a_reproduction_has_everything(run: tuple[Reproduction, dict[str, Any]]) -> None:
    what, content = run
    labels = {row["label"] for row in content["methods"]}
    assert labels == set(main_runs(8, 64, 11, 1))
    assert {row["label"] for row in content["share_matched"]} == set(ROUTERS)
    for row in content["methods"]:
        assert math.isfinite(row["norm_mse"]), row["name"]
        assert row["label"] == "RouteSAE, soft" or math.isfinite(row["kl"]), row["name"]
    # a router's random twin is given its shares
    by_name = {row["name"]: row for row in content["methods"]}
    for twin in content["share_matched"]:
        own = np.array(by_name[twin["name"]]["share"])
        assert twin["routing"] == "uniform"
        assert twin["mean_probs"] == pytest.approx(own, abs=1e-6)
    written = {path.name for path in what.output.iterdir()}
    figures = {"tradeoff_kl", "tradeoff_norm_mse", "features_by_sparsity", "scores_by_sparsity"}
    figures |= {"route_features_by_threshold", "route_scores_by_threshold", "routing_shares"}
    figures |= {"features_by_threshold", "routing_shares_training", "features_by_layer"}
    made = {f"{name}{suffix}" for name in figures for suffix in (".html", ".svg")}
    assert {"reproduction.json", *made} <= written
    assert json.loads((what.output / "reproduction.json").read_text())["methods"]
    for name, table in tables(content).items():
        assert table.count("\n") >= 1, name


def test_the_routers_table_says_what_the_rows_do(
    run: tuple[Reproduction, dict[str, Any]],
) -> None:
    _, content = run
    own = [row for row in content["methods"] if row["name"].startswith(f"{ROUTE} seed=")]
    mean = np.mean([row["norm_mse"] for row in own])
    line = next(x for x in tables(content)["routers"].splitlines() if x.startswith(f"| {ROUTE} |"))
    assert f"{mean:.3f}" in line


def test_every_method_of_the_figures_is_there_at_every_sparsity(
    run: tuple[Reproduction, dict[str, Any]],
) -> None:
    what, content = run
    table = tables(content)["sparsity"]
    for label in SHOWN:
        for k in (what.k, *what.other_ks):
            assert f"| {label} | {k} |" in table, (label, k)
    # the lower threshold lets more features through, whichever method it is
    for row in content["features"]["methods"]:
        assert row["n_features"] == sorted(row["n_features"], reverse=True), row["name"]
        at = row["thresholds"].index(max(t for t in row["thresholds"] if t <= 0.2 * 8 + 1e-9))
        assert row["more_than_4_contexts"] <= row["n_features"][at]


def test_shares_while_training_are_the_logs_mean(
    run: tuple[Reproduction, dict[str, Any]],
) -> None:
    what, content = run
    lines = (what.output / "methods" / "train_log.jsonl").read_text().splitlines()
    for row in content["training_shares"]:
        name = f"{row['label']} seed={row['seed']}"
        logged = [json.loads(line) for line in lines if json.loads(line)["name"] == name]
        shares = [[r[f"route_share/{i}"] for i in range(len(row["share"]))] for r in logged]
        assert row["share"] == pytest.approx(np.mean(shares, axis=0), abs=1e-6)
        assert sum(row["share"]) == pytest.approx(1, abs=1e-4)


def test_differences_change_one_thing(run: tuple[Reproduction, dict[str, Any]]) -> None:
    what, content = run
    assert {row["label"] for row in content["differences"]} == set(DIFFERENCES)
    assert len(content["differences"]) == len(DIFFERENCES) * len(what.seeds)
    assert not {row["label"] for row in content["methods"]} & set(DIFFERENCES)
    lines = tables(content)["differences"].splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == [
        ROUTE, PLAIN_MSE, MEAN, ATTENTION, *DIFFERENCES
    ]  # fmt: skip


def test_what_is_there_is_not_made_again(run: tuple[Reproduction, dict[str, Any]]) -> None:
    what, content = run
    weights = what.output / "methods" / f"{ASSIGNMENT} seed=0" / "sae_weights.safetensors"
    before = weights.stat().st_mtime_ns
    again = reproduce(what)
    assert again["methods"] == json.loads(json.dumps(content["methods"]))
    assert weights.stat().st_mtime_ns == before


def test_a_folder_of_other_settings_is_refused(run: tuple[Reproduction, dict[str, Any]]) -> None:
    what, _ = run
    with pytest.raises(ValueError, match=r"k=8, not 4"):
        reproduce(replace(what, k=4))
