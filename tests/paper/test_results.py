"""A reproduction's numbers survive the file, with their types."""

import json

from support.reproduction import OTHER_K, K, counts, made_result

from sae_lens_route.paper.methods import ROUTE
from sae_lens_route.paper.plan import Run
from sae_lens_route.paper.results import (
    THRESHOLD_SHARES,
    FeatureDepth,
    Features,
    ReproductionResult,
    counted_shares,
)
from sae_lens_route.records import plain, typed


def test_the_file_holds_everything() -> None:
    result = made_result(depths=[FeatureDepth(4, 8.6)])
    again = typed(ReproductionResult, json.loads(json.dumps(plain(result))))
    assert again == result
    assert set(again.features.shown[0].activation_by_block) == {2, 5, 9}


def test_a_methods_sparsities_are_of_the_first_seed_with_their_own_features() -> None:
    low = Run(ROUTE.label, OTHER_K, 0, "sparsity")
    result = made_result({low: {"norm_mse": 0.9}}, {low: {"more_than_4_contexts": 1}})
    pairs = result.at_sparsities(ROUTE)
    assert [trained.run for trained, _ in pairs] == [low, Run(ROUTE.label, K, 0)]
    assert pairs[0][0].row.norm_mse == 0.9 and pairs[0][1].more_than_4_contexts == 1
    assert all(trained.run == features.run for trained, features in pairs)


def test_a_judges_score_and_the_surface_score_are_two_numbers() -> None:
    run = Run(ROUTE.label, K, 0)
    assert counts(run).surface_score == 0.7 and counts(run).judge_score is None
    assert counts(run, judge_score=4.0).surface_score == 0.7


def test_a_threshold_of_ones_own_is_counted_among_the_others() -> None:
    assert counted_shares(0.2) == THRESHOLD_SHARES
    assert counted_shares(0.3) == (0.1, 0.15, 0.2, 0.25, 0.3, 0.331, 0.4)


def test_features_of_groups_are_put_together() -> None:
    whole = made_result().features
    parts = [Features([count], [], [], []) for count in whole.counts]
    assert (
        Features.of_groups([*parts, Features([], whole.depths, whole.shown, whole.steering)])
        == whole
    )


def test_folders_of_a_sweep_are_told_apart() -> None:
    assert Run("A", 8, 0).name == "A seed=0"
    assert Run("A", 8, 0, "sparsity").name == "A k=8"
