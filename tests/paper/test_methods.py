"""The records of the methods: each can be trained, and differs from the others as it says."""

from pathlib import Path

import pytest
from support.small import small_config

from sae_lens_route.errors import UserError
from sae_lens_route.paper.methods import (
    CROSSCODER,
    CROSSCODER_TOPK,
    JUMPRELU,
    METHODS,
    RELU,
    ROUTE,
    TOPK,
    Method,
    Target,
    shown_in,
)
from sae_lens_route.paper.plan import Reproduction
from sae_lens_route.training.entries import expand_runs

TARGET = Target(k=8, d_in=64, routed_blocks=(2, 5, 9), n_steps=100, penalty=0.5)


def settings(method: Method, target: Target = TARGET) -> dict:
    return method.settings(target)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.label)
def test_saelens_knows_every_method(method: Method) -> None:
    (entry,) = expand_runs({method.label: {"d_sae": 128, **settings(method)}}, 64, [3]).values()
    assert entry.label == method.label and entry.seed == 3


def test_labels_are_unique() -> None:
    assert len({method.label for method in METHODS}) == len(METHODS)


def test_single_layer_baselines_read_the_last_routed_block() -> None:
    assert all(settings(method)["blocks"] == [9] for method in (TOPK, RELU, JUMPRELU))
    assert "blocks" not in settings(ROUTE) and "blocks" not in settings(CROSSCODER)


def test_without_the_last_block_leaves_the_others() -> None:
    variant = METHODS[-1]
    assert variant.label == "without the last block"
    assert settings(variant) == {"k": 8, "blocks": [2, 5]}
    assert settings(variant, TARGET._replace(routed_blocks=(9,))) == {"k": 8}


def test_a_method_without_k_takes_the_penalty_that_was_found() -> None:
    fields = {
        RELU: "l1_coefficient",
        JUMPRELU: "jumprelu_init_threshold",
        CROSSCODER: "l1_coefficient",
    }
    for method in METHODS:
        assert (method.first_penalty is None) == ("k" in settings(method)), method.label
        if method.first_penalty is not None:
            assert method.first_penalty(TARGET) > 0
    assert all(settings(method)[field] == 0.5 for method, field in fields.items())
    assert settings(CROSSCODER)["l1_warm_up_steps"] == 25


def test_differences_change_one_setting_of_the_routesae() -> None:
    for method in METHODS:
        if method.is_difference:
            (changed,) = settings(method).keys() - settings(ROUTE).keys()
            assert settings(method) == settings(ROUTE) | {changed: settings(method)[changed]}


def test_every_table_of_sparsities_shows_traded_methods() -> None:
    for exhibit in ("sparsity", "aggregation", "soft"):
        shown = shown_in(exhibit)
        assert ROUTE in shown and all(method.is_traded for method in shown)
    assert not any(method.is_traded for method in METHODS if method.is_difference)


def test_a_router_with_a_twin_is_hard() -> None:
    for method in METHODS:
        if method.has_twin:
            assert settings(method).get("routing", "hard") == "hard"


def test_a_method_can_be_left_out_unless_others_need_it(tmp_path: Path) -> None:
    def reproduction(*without: str) -> Reproduction:
        cfg = small_config(tmp_path)
        sizes = {"eval_tokens": 1, "feature_tokens": 1, "output": tmp_path}
        return Reproduction(cfg, 8, (4,), (0,), "demo", **sizes, without=without)

    labels = [CROSSCODER.label, CROSSCODER_TOPK.label]
    methods = {run.method for run in reproduction(*labels).runs()}
    assert methods == {method.label for method in METHODS} - {*labels}
    for label in ("TopK", ROUTE.label, "nothing"):
        with pytest.raises(UserError, match=f"without='{label}': must be one of .*MLSAE"):
            reproduction(label)
    with pytest.raises(UserError, match="'Crosscoder' takes its learning rate"):
        reproduction(CROSSCODER_TOPK.label)
