"""A small real reproduction: every method on the tiny Llama, two seeds, a dozen steps."""

import json
import math
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from sae_lens import SAE
from support.judge import Endpoint, scripted_judge
from support.small import small_config

from sae_lens_route.errors import UserError
from sae_lens_route.evals.evaluate import evaluate
from sae_lens_route.evals.reconstruction import ReconstructionMetrics
from sae_lens_route.paper.figures import figures
from sae_lens_route.paper.held_out import split_held_out
from sae_lens_route.paper.learning_rates import best_learning_rates
from sae_lens_route.paper.methods import ASSIGNMENT, METHODS, ROUTE, SOFT, shown_in
from sae_lens_route.paper.plan import Reproduction, Run
from sae_lens_route.paper.report import tables
from sae_lens_route.paper.reproduction import reproduce
from sae_lens_route.paper.results import ReproductionResult, of_method

BLOCKS = [2, 5, 9]


class Made(NamedTuple):
    reproduction: Reproduction
    result: ReproductionResult
    page: str


@pytest.fixture(scope="module")
def judge() -> Iterator[Endpoint]:
    """A scripted judge behind a real endpoint, and the key that the real client asks for."""
    server = Endpoint()
    server.read_prompt = scripted_judge
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", "k")
        yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, judge: Endpoint) -> Made:
    output = tmp_path_factory.mktemp("reproduction")
    cfg = small_config(
        output, sae={"d_sae": 128, "k": 8}, training_tokens=16 * 4 * 12, routed_blocks=BLOCKS
    )
    reproduction = Reproduction(
        cfg=cfg,
        k=8,
        other_ks=(4,),
        seeds=(0, 1),
        eval_dataset="demo:heldout",
        eval_tokens=128,
        feature_tokens=512,
        output=output,
        search_tokens=16 * 4 * 4,
        read_share=0.1,
        judge="scripted",
        base_url=judge.url,
    )
    page = tmp_path_factory.mktemp("page") / "page.md"
    page.write_text("<!-- table: shares --><!-- /table -->")
    return Made(reproduction, reproduce(reproduction, page=page), page.read_text())


def test_every_run_is_evaluated(made: Made) -> None:
    runs = [each.run for each in made.result.trained]
    assert len(set(runs)) == len(runs)
    for method in METHODS:
        stage = "differences" if method.is_difference else "main"
        assert {Run(method.label, 8, seed, stage) for seed in (0, 1)} <= set(runs)
        assert (Run(method.label, 4, 0, "sparsity") in runs) == method.is_traded
        assert (Run(method.label, 8, 1, "share_matched") in runs) == method.has_twin
    for each in made.result.trained:
        assert each.row.label == each.run.method and each.row.seed == each.run.seed
        assert math.isfinite(each.row.norm_mse), each.run
        assert (each.row.kl is None) == (each.run.method == SOFT.label), each.run


def test_tables_are_made_on_text_that_no_choice_was_made_on(made: Made, tinyllama: Any) -> None:
    run = Run(ROUTE.label, 8, 0)
    sae = SAE.load_from_disk(made.reproduction.output / "methods" / "1" / run.name)
    held_out = split_held_out(made.reproduction.eval_dataset)
    found, other = (evaluate(tinyllama, sae, text, max_tokens=128) for text in held_out[::-1])
    (row,) = [each.row for each in made.result.trained if each.run == run]
    assert row.norm_mse == pytest.approx(found.reconstruction.norm_mse, rel=1e-5)
    assert row.norm_mse != pytest.approx(other.reconstruction.norm_mse, rel=1e-3)


def test_every_dictionary_trains_at_its_methods_learning_rate(made: Made) -> None:
    lr, trials = made.reproduction.cfg.lr, made.result.learning_rates
    assert {trial.method for trial in trials} == {m.label for m in METHODS if m.rate_of is None}
    assert {trial.lr for trial in trials} == {factor * lr for factor in (1.0, 2.5, 6.25, 15.625)}
    best = best_learning_rates(trials)
    assert best[ROUTE.label] != lr
    for each in made.result.trained:
        assert each.row.lr == best[each.run.method]
    assert made.result.settings.dead_feature_window == 12 // 4


def test_a_twin_has_its_routers_shares(made: Made) -> None:
    rows = {each.run: each.row for each in made.result.trained}
    for run, twin in rows.items():
        if run.stage == "share_matched":
            router = rows[replace(run, stage="main")]
            assert twin.settings.routing == "uniform"
            assert isinstance(twin.reconstruction, ReconstructionMetrics)
            expected = pytest.approx(router.share_by_block, abs=1e-6)
            assert twin.reconstruction.mean_probs_by_block == expected


def test_blocks_are_named_everywhere(made: Made) -> None:
    route = Run(ROUTE.label, 8, 0)
    (row,) = [each.row for each in made.result.trained if each.run == route]
    assert list(row.share_by_block or ()) == BLOCKS
    assert all(list(shares.share_by_block) == BLOCKS for shares in made.result.training_shares)
    for shown in made.result.features.shown:
        assert list(shown.activation_by_block) == list(shown.profile.share_by_block or ()) == BLOCKS
    assert all(2 <= depth.mean_block <= 9 for depth in made.result.features.depths)
    assert "| block 2 | block 5 | block 9 |" in made.page


def test_everything_is_written(made: Made) -> None:
    output = made.reproduction.output
    written = {path.name for path in output.iterdir()}
    drawn = {f"{name}{suffix}" for name in figures(made.result) for suffix in (".html", ".svg")}
    assert {"reproduction.json", *drawn} <= written
    assert ReproductionResult.read(output / "reproduction.json") == made.result
    for name, table in tables(made.result).items():
        assert table.count("\n") >= 1, name


def test_the_routers_table_says_what_the_rows_do(made: Made) -> None:
    trained = of_method(made.result.trained, ROUTE, "main")
    mean = np.mean([each.row.norm_mse for each in trained])
    table = tables(made.result)["routers"]
    line = next(x for x in table.splitlines() if x.startswith(f"| {ROUTE.label} |"))
    assert f"{mean:.3f}" in line


def test_a_lower_threshold_lets_more_features_through(made: Made) -> None:
    for counts in made.result.features.counts:
        assert counts.n_features == sorted(counts.n_features, reverse=True), counts.run
        assert counts.more_than_4_contexts <= counts.n_read
    assert {counts.run for counts in made.result.features.counts} == {
        each.run for each in made.result.trained if each.run.stage in ("main", "sparsity")
    }


def test_shares_while_training_are_the_logs_mean(made: Made) -> None:
    log = made.reproduction.output / "methods" / "1" / "train_log.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(made.result.training_shares) == 2 * sum(method.has_twin for method in METHODS)
    for shares in made.result.training_shares:
        logged = [record for record in records if record["name"] == shares.run.name]
        for block, share in shares.share_by_block.items():
            mean = np.mean([record[f"route_share/block_{block}"] for record in logged])
            assert share == pytest.approx(mean, abs=1e-6)
        assert sum(shares.share_by_block.values()) == pytest.approx(1, abs=1e-4)


def test_the_judges_scores_are_those_of_its_answers(made: Made) -> None:
    """Of the methods of the trade-off, first seed; the claim about the score is held to them."""
    asked = {
        f"{method.label} {end}" for method in shown_in("sparsity") for end in ("seed=0", "k=4")
    }
    folder, n_judged = made.reproduction.output / "judge", 0
    for counts in made.result.features.counts:
        path = folder / f"{counts.run.name}.jsonl"
        assert path.exists() == (counts.run.name in asked and counts.n_read > 0), counts.run
        if path.exists():
            results = [json.loads(line) for line in path.read_text().splitlines()]
            scores = [result["score"] for result in results if result.get("score") is not None]
            assert len(scores) == min(100, counts.n_read)
            assert counts.judge_score == pytest.approx(sum(scores) / len(scores))
            n_judged += 1
        else:
            assert counts.judge_score is None
    assert n_judged > 5
    assert "judge's score" in tables(made.result)["claims"]
    assert "judge_scores_by_sparsity" in figures(made.result)


def test_the_scaled_splice_is_that_of_the_main_comparison(made: Made) -> None:
    """The same text and tokens: equal up to float32 sums in batches of another size."""
    rows = {each.run: each.row for each in made.result.trained}
    assert made.result.unscaled
    for scales in made.result.unscaled:
        assert scales.kl == pytest.approx(rows[scales.run].kl, rel=1e-5)
        assert scales.route_weight == rows[scales.run].route_weight < 1
        assert scales.kl_unscaled != pytest.approx(scales.kl, rel=5e-5)


def test_a_finished_stage_is_not_repeated(made: Made) -> None:
    output = made.reproduction.output
    weights = output / "methods" / "1" / f"{ASSIGNMENT.label} seed=0" / "sae_weights.safetensors"
    before = weights.stat().st_mtime_ns
    again = reproduce(made.reproduction)
    assert again.trained == made.result.trained and again.features == made.result.features
    assert weights.stat().st_mtime_ns == before


def test_a_folder_of_other_settings_is_refused(made: Made, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"k=8, not 4"):
        reproduce(replace(made.reproduction, k=4))
