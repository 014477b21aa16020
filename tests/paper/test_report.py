"""Every table of a hand-made reproduction: cells, columns, signs, and the order of lines."""

import re
from pathlib import Path
from typing import Any

import pytest
from support.reproduction import OTHER_K, K, made_result

from sae_lens_route.paper.markdown import fill_tables
from sae_lens_route.paper.methods import (
    ASSIGNMENT,
    ATTENTION,
    MEAN,
    METHODS,
    PLAIN_MSE,
    RANDOM,
    RELU,
    ROUTE,
    SOFT,
    TOPK,
    shown_in,
)
from sae_lens_route.paper.plan import Run
from sae_lens_route.paper.report import tables
from sae_lens_route.paper.results import FeatureDepth, ReproductionResult

DOCS = Path(__file__).parents[2] / "docs"


def lines(result: ReproductionResult, name: str) -> list[dict[str, str]]:
    """A table's lines; a repeated heading is told from the first by the heading before it."""
    header, _, *body = [line.strip("| ").split(" | ") for line in tables(result)[name].split("\n")]
    names = [f"{header[i - 1]}: {h}" if h in header[:i] else h for i, h in enumerate(header)]
    return [dict(zip(names, line, strict=True)) for line in body]


def line(result: ReproductionResult, name: str, first: str) -> dict[str, str]:
    (found,) = [cells for cells in lines(result, name) if next(iter(cells.values())) == first]
    return found


def firsts(result: ReproductionResult, name: str) -> list[str]:
    return [next(iter(cells.values())) for cells in lines(result, name)]


def both_seeds(label: str, stage: Any = "main", **values: Any) -> dict[Run, dict[str, Any]]:
    return {Run(label, K, seed, stage): values for seed in (0, 1)}


def test_settings_are_shown_by_name() -> None:
    result = made_result(lr=0.25)
    assert line(result, "settings", "lr") == {"setting": "lr", "value": "0.25"}
    assert line(result, "settings", "routed_blocks")["value"] == "[2, 5, 9]"


def test_a_router_is_compared_with_its_share_matched_twin() -> None:
    result = made_result(
        both_seeds(ROUTE.label, norm_mse=0.2, kl=1.0)
        | both_seeds(ROUTE.label, "share_matched", norm_mse=0.25, kl=2.0)
        | both_seeds(RANDOM.label, norm_mse=0.8, kl=8.0)
    )
    cells = line(result, "routers", ROUTE.label)
    assert cells["NormMSE"] == "0.200 ± 0.000" and cells["KL"] == "1.000 ± 0.000"
    assert cells["same shares, random: NormMSE"] == "0.250 ± 0.000"
    assert cells["same shares, random: NormMSE: KL"] == "2.000 ± 0.000"
    assert cells["gain, NormMSE"] == "20.0% ± 0.0%" and cells["gain, KL"] == "50.0% ± 0.0%"


def test_a_router_worse_than_its_twin_has_a_negative_gain() -> None:
    result = made_result(both_seeds(ROUTE.label, "share_matched", norm_mse=0.1, kl=0.5))
    cells = line(result, "routers", ROUTE.label)
    assert cells["gain, NormMSE"].startswith("-100.0%") and cells["gain, KL"].startswith("-100.0%")


def test_routers_are_reweighted_by_the_shares_of_the_assignment() -> None:
    route = {
        "share_by_block": {2: 0.0, 5: 0.375, 9: 0.625},
        "norm_mse_by_block": {2: 0.1, 5: 0.2, 9: 0.3},
        "kl_by_block": {2: 1.0, 5: 2.0, 9: 6.0},
    }
    assignment = {"share_by_block": {2: 0.5, 5: 0.5, 9: 0.0}}
    result = made_result(
        both_seeds(ROUTE.label, **route) | both_seeds(ASSIGNMENT.label, **assignment)
    )
    cells = line(result, "routers", ROUTE.label)
    assert cells["NormMSE at the assignment's shares"] == "0.150 ± 0.000"
    assert cells["KL there"] == "1.500 ± 0.000"
    assert cells["least share"] == "0.000"
    assert cells["mean p"] == "0.75 ± 0.00"


def test_a_router_that_leaves_a_block_empty_cannot_be_reweighted() -> None:
    empty = {"norm_mse_by_block": {2: None, 5: 0.2, 9: 0.3}}
    result = made_result({Run(ROUTE.label, K, 1): empty})
    assert line(result, "routers", ROUTE.label)["NormMSE at the assignment's shares"] == "-"


def test_the_uniform_router_has_no_twin() -> None:
    cells = line(made_result(), "routers", RANDOM.label)
    assert cells["gain, NormMSE"] == cells["gain, KL"] == "-"
    assert cells["same shares, random: NormMSE"] == "-"
    assert firsts(made_result(), "routers") == [method.label for method in shown_in("routers")]


def test_shares_are_headed_by_blocks() -> None:
    result = made_result({Run(MEAN.label, K, 1): {"share_by_block": {2: 0.1, 5: 0.2, 9: 0.7}}})
    _, second = [cells for cells in lines(result, "shares") if cells["method"] == MEAN.label]
    assert second == {
        "method": MEAN.label, "seed": "1", "block 2": "0.10", "block 5": "0.20", "block 9": "0.70",
    }  # fmt: skip


def test_shares_are_those_of_methods_that_choose() -> None:
    labels = set(firsts(made_result(), "shares"))
    assert {ROUTE.label, RANDOM.label, SOFT.label, "MLSAE"} <= labels
    assert not labels & {TOPK.label, "Crosscoder", RELU.label}


def test_all_methods_have_a_line_in_order() -> None:
    labels = [method.label for method in METHODS if not method.is_difference]
    assert firsts(made_result(), "methods") == labels


def test_columns_of_the_methods() -> None:
    values = {
        "norm_mse": 0.1, "kl": 2.0, "l0": 15.5, "loss_recovered": 0.75, "dead_features": 3,
        "route_weight": 0.25, "n_parameters": 1_234_567,
    }  # fmt: skip
    cells = line(made_result(both_seeds(TOPK.label, **values)), "methods", TOPK.label)
    assert cells == {
        "method": "TopK",
        "seeds": "2",
        "parameters": "1,234,567",
        "L0": "15.5 ± 0.0",
        "NormMSE": "0.100 ± 0.000",
        "KL": "2.000 ± 0.000",
        "loss recovered": "0.750 ± 0.000",
        "dead features": "3 ± 0",
        "dense features": "5 ± 0",
        "mean p": "0.25 ± 0.00",
    }


def test_the_interval_is_over_seeds() -> None:
    rows = {Run(TOPK.label, K, 0): {"kl": 1.0}, Run(TOPK.label, K, 1): {"kl": 1.2}}
    # t(.975, 1 degree of freedom) = 12.706 times the standard error .1
    assert line(made_result(rows), "methods", TOPK.label)["KL"] == "1.100 ± 1.271"


def test_soft_routing_has_no_kl_and_a_crosscoder_no_p() -> None:
    soft = line(made_result(), "methods", SOFT.label)
    assert soft["KL"] == soft["loss recovered"] == "-" and soft["NormMSE"] != "-"
    crosscoder = line(made_result(), "methods", "Crosscoder")
    assert crosscoder["mean p"] == "-" and crosscoder["KL"] != "-"


def test_differences_are_changes_of_the_routesae_with_the_same_seed() -> None:
    result = made_result(
        {
            Run(ROUTE.label, K, 0): {"norm_mse": 0.2, "kl": 1.0},
            Run(ROUTE.label, K, 1): {"norm_mse": 0.4, "kl": 2.0},
            Run(MEAN.label, K, 0): {"norm_mse": 0.1, "kl": 1.5},
            Run(MEAN.label, K, 1): {"norm_mse": 0.2, "kl": 3.0},
        }
    )
    cells = line(result, "differences", MEAN.label)
    assert cells["change"] == "-50.0% ± 0.0%" and cells["KL: change"] == "+50.0% ± 0.0%"
    assert cells["NormMSE"].startswith("0.150") and cells["KL"].startswith("2.250")
    assert line(result, "differences", ROUTE.label)["change"] == "-"


def test_differences_stand_in_order_with_the_share_of_their_last_block() -> None:
    variants = [method.label for method in METHODS if method.is_difference]
    result = made_result(
        both_seeds(variants[-1], "differences", share_by_block={2: 0.25, 5: 0.75})
        | both_seeds(PLAIN_MSE.label, share_by_block={2: 0.9, 5: 0.0, 9: 0.1})
    )
    expected = [ROUTE.label, PLAIN_MSE.label, MEAN.label, ATTENTION.label, *variants]
    assert firsts(result, "differences") == expected
    share = "share of its last block"
    assert line(result, "differences", variants[-1])[share] == "0.75 ± 0.00"
    assert line(result, "differences", PLAIN_MSE.label)[share] == "0.10 ± 0.00"


def test_context_rules_count_at_the_threshold_features_are_read_at() -> None:
    values = {
        "n_features": [6, 5, 4, 3, 2, 1], "more_than_4_contexts": 30, "at_most_32_classes": 20,
    }  # fmt: skip
    result = made_result(features=both_seeds(TOPK.label, **values))
    assert line(result, "context-rules", TOPK.label) == {
        "method": "TopK",
        "at least 4 contexts (paper)": "4 ± 0",
        "more than 4 (code)": "30 ± 0",
        "at most 32 token classes (code)": "20 ± 0",
    }
    assert firsts(result, "context-rules") == [ROUTE.label, ASSIGNMENT.label, TOPK.label]


def test_sparsities_ascend_and_are_of_the_first_seed() -> None:
    result = made_result(
        {
            Run(RELU.label, OTHER_K, 0, "sparsity"): {"l0": 7.5, "norm_mse": 0.5, "kl": 3.0},
            Run(RELU.label, K, 0): {"l0": 16.5, "norm_mse": 0.25, "kl": 2.0},
            Run(RELU.label, K, 1): {"l0": 99.0, "norm_mse": 0.99, "kl": 9.0},
        },
        {
            Run(RELU.label, OTHER_K, 0, "sparsity"): {"judge_score": 4.5},
            Run(RELU.label, K, 0): {"n_features": [60, 50, 17, 30, 20, 10]},
        },
    )
    pairs = [(cells["method"], cells["k aimed at"]) for cells in lines(result, "sparsity")]
    assert pairs == [(m.label, str(k)) for m in shown_in("sparsity") for k in (OTHER_K, K)]
    low, high = [cells for cells in lines(result, "sparsity") if cells["method"] == RELU.label]
    assert low == {
        "method": "ReLU", "k aimed at": "8", "L0": "7.5", "NormMSE": "0.500", "KL": "3.000",
        "dense features": "5", "features above 0.2 sqrt d": "40", "surface score": "0.700",
        "judge's score": "4.500",
    }  # fmt: skip
    assert high == {
        "method": "ReLU", "k aimed at": "16", "L0": "16.5", "NormMSE": "0.250", "KL": "2.000",
        "dense features": "5", "features above 0.2 sqrt d": "17", "surface score": "0.700",
        "judge's score": "-",
    }  # fmt: skip


def test_tables_2_and_3_of_the_paper() -> None:
    result = made_result()
    assert set(firsts(result, "aggregation")) == {ROUTE.label, ATTENTION.label}
    assert set(firsts(result, "soft")) == {ROUTE.label, SOFT.label}
    assert [cells["KL"] == "-" for cells in lines(result, "soft")] == [False, False, True, True]


def test_features_have_a_column_per_threshold_and_both_scores() -> None:
    values = {"judge_score": 4.25, "surface_scores": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]}
    result = made_result(features=both_seeds(ROUTE.label, **values))
    cells = list(line(result, "features", ROUTE.label).items())
    assert cells[1] == ("features above 0.1 sqrt d", "60 ± 0")
    assert cells[3] == ("features above 0.2 sqrt d", "40 ± 0")
    assert cells[6] == ("features above 0.4 sqrt d", "10 ± 0")
    assert cells[7:] == [("surface score", "0.300 ± 0.000"), ("judge's score", "4.250 ± 0.000")]
    assert line(result, "features", RANDOM.label)["judge's score"] == "-"


def test_the_claims_are_held_against_topk() -> None:
    def n(value: int) -> dict[str, Any]:
        return {"n_features": [0, 0, value, 0, 0, 0]}

    result = made_result(
        features=both_seeds(ROUTE.label, **n(120))
        | both_seeds(TOPK.label, **n(100), surface_scores=[None, None, 0.5, None, None, None])
        | both_seeds(RANDOM.label, **n(50))
    )
    claims = lines(result, "claims")
    methods = [ROUTE.label, ASSIGNMENT.label, RANDOM.label]
    assert [cells["method"] for cells in claims] == 2 * methods
    assert claims[0] == {
        "measure": "features above 0.2 sqrt d", "method": ROUTE.label, "mean": "120", "TopK": "100",
        "difference": "+20.0% ± 0.0%",
    }  # fmt: skip
    assert claims[2]["difference"] == "-50.0% ± 0.0%"
    assert claims[3] == {
        "measure": "surface score", "method": ROUTE.label, "mean": "0.7", "TopK": "0.5",
        "difference": "+40.0% ± 0.0%",
    }  # fmt: skip


def test_the_claim_about_the_score_is_held_against_the_judge_where_one_was_asked() -> None:
    result = made_result(
        features=both_seeds(ROUTE.label, judge_score=4.4) | both_seeds(TOPK.label, judge_score=4.0)
    )
    _, score = [cells for cells in lines(result, "claims") if cells["method"] == ROUTE.label]
    assert score == {
        "measure": "judge's score", "method": ROUTE.label, "mean": "4.4", "TopK": "4",
        "difference": "+10.0% ± 0.0%",
    }  # fmt: skip
    assert "surface score" not in tables(result)["claims"]


def test_scaled_stands_before_unscaled() -> None:
    first = lines(made_result(), "unscaled")[0]
    assert first == {
        "method": ROUTE.label, "seed": "0", "mean p": "0.25", "KL, scaled": "1.5000",
        "KL, unscaled": "1.7500",
    }  # fmt: skip


def test_ours_stands_by_the_papers_numbers_for_the_papers_model_alone() -> None:
    rows = {Run(ROUTE.label, 64, seed): {"norm_mse": 0.125, "kl": 0.25} for seed in (0, 1)}
    ours = made_result(rows, model_name="x/Llama-3.2-1B-Instruct", d_sae=16_384, k=64)
    assert line(ours, "paper", "64") == {
        "k": "64", "NormMSE, paper": "0.158", "ours": "0.125 ± 0.000",
        "KL per 512 tokens, paper": "81", "KL per 512 tokens, paper: ours": "128 ± 0",
        "features, paper": "4194", "score, paper": "4.49",
    }  # fmt: skip
    assert line(ours, "paper", "48")["ours"] == "-"
    assert line(made_result(rows, k=64), "paper", "64")["ours"] == "-"


def test_a_feature_that_lives_at_block_9_is_printed_at_block_9() -> None:
    (cells,) = lines(made_result(), "feature-blocks")
    assert cells["mean block"] == "8.6"  # .1 * 5 + .9 * 9; as positions it would be 1.9
    assert [cells[f"block {block}"] for block in (2, 5, 9)] == ["0%", "10%", "90%"]
    assert cells["kind"] == "pattern" and cells["feature"] == "7" and cells["token classes"] == "4"


def test_a_context_fits_in_a_cell() -> None:
    (cells,) = lines(made_result(), "feature-blocks")
    first, second = cells["contexts"].split("<br>")
    assert first == "`a &#124; b <ACTIVATED>c</ACTIVATED> 'd'`"
    assert second == "`<ACTIVATED>c</ACTIVATED>`"


def test_depths_are_blocks() -> None:
    depths = [FeatureDepth(n_classes=10 - i, mean_block=9.0 - i / 2) for i in range(8)]
    (cells,) = lines(made_result(depths=depths), "depth")
    assert cells["features"] == "8" and cells["rank correlation of classes and block"] == "1.00"
    assert cells["median block, quarter with the fewest classes"] == "5.8"  # of 5.5 and 6
    assert cells["with the most"] == "8.8"
    # two against two, all larger: 1 of the 6 orders
    assert cells["p, one-sided"] == "0.17"
    few = made_result(depths=depths[:7])
    assert line(few, "depth", "7")["p"] == "-"


def test_a_steering_is_shown_on_one_line_each() -> None:
    shown = {cells["part"]: cells["steering"] for cells in lines(made_result(), "steering")}
    assert shown == {
        "feature": "7, which fires on cat",
        "edit": "`7:set:1.5x`, at most 0.25 of the stream's norm",
        "prompt": "`The &#124; a`",
        "clean": "`dog`",
        "steered": "`cat cat`",
        "uses of its words": "0 clean, 2 steered",
    }


@pytest.mark.parametrize("name", ["reproduction", "reproduction-smollm2"])
def test_the_tables_of_the_documentation_are_those_of_its_numbers(
    tmp_path: Path, name: str
) -> None:
    shown = (DOCS / f"{name}.md").read_text()
    page = tmp_path / "page.md"
    page.write_text(shown)
    made = tables(ReproductionResult.read(DOCS / f"{name}.json"))
    fill_tables(page, made)
    assert page.read_text() == shown
    marked = set(re.findall("<!-- table: (.+?) -->", shown))
    # one sparsity, and another model than the paper's
    left_out = {"sparsity", "aggregation", "soft", "paper"} if name != "reproduction" else set()
    assert marked == made.keys() - left_out
