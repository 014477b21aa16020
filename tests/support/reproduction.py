"""A hand-made reproduction: every method with two seeds, routed blocks 2, 5 and 9."""

from collections.abc import Mapping
from typing import Any

from sae_lens_route.evals.comparison import SweepRow, SweepSettings
from sae_lens_route.evals.downstream import DownstreamMetrics
from sae_lens_route.evals.reconstruction import CrosscoderMetrics, ReconstructionMetrics
from sae_lens_route.features.table import FeatureProfile
from sae_lens_route.paper.methods import METHODS, PLAIN_MSE, ROUTE, SOFT, Method
from sae_lens_route.paper.plan import Run, Settings
from sae_lens_route.paper.results import (
    THRESHOLD_SHARES,
    FeatureCounts,
    FeatureDepth,
    Features,
    RateTrial,
    ReproductionResult,
    ShownFeature,
    SpliceScales,
    Trained,
    TrainingShares,
)
from sae_lens_route.paper.steering_example import SteeringExample

BLOCKS = [2, 5, 9]
K, OTHER_K = 16, 8
SEEDS = [0, 1]
SINGLE_BLOCK = (
    "TopK",
    "TopK, SAELens defaults",
    "TopK, SAELens, decoder norm 1",
    "ReLU",
    "Gated",
    "JumpReLU",
)


def row(
    label: str = ROUTE.label,
    *,
    seed: int = 0,
    norm_mse: float = 0.2,
    kl: float | None = 1.0,
    share_by_block: dict[int, float] | None = None,
    norm_mse_by_block: dict[int, float | None] | None = None,
    kl_by_block: dict[int, float | None] | None = None,
    route_weight: float = 0.75,
    l0: float = 16.0,
    dead_features: int = 12,
    dense_features: int = 5,
    loss_recovered: float = 0.875,
    n_parameters: int = 12_345,
) -> SweepRow:
    """A row of a sweep. Shares of a router are .5, .25 and .25 at blocks 2, 5 and 9."""
    if share_by_block is None:
        share_by_block = {9: 1.0} if label in SINGLE_BLOCK else {2: 0.5, 5: 0.25, 9: 0.25}
    blocks = list(share_by_block)
    if label.startswith("Crosscoder"):
        reconstruction = CrosscoderMetrics(
            100, norm_mse, 0.5, l0, dead_features, dict.fromkeys(blocks, norm_mse), dense_features
        )
    else:
        reconstruction = ReconstructionMetrics(
            n_tokens=100,
            norm_mse=norm_mse,
            explained_variance=0.5,
            l0=l0,
            dead_features=dead_features,
            share_by_block=share_by_block,
            mean_probs_by_block=share_by_block,
            load_entropy=1.0,
            route_weight=route_weight,
            margin=0.5,
            norm_mse_by_block=norm_mse_by_block or dict.fromkeys(blocks, norm_mse),
            norm_mse_fixed_block=dict.fromkeys(blocks, norm_mse),
            norm_mse_uniform=norm_mse,
            norm_mse_matched=norm_mse,
            norm_mse_best=norm_mse,
            regret=0.0,
            dense_features=dense_features,
        )
    downstream = None
    if kl is not None:
        downstream = DownstreamMetrics(
            n_tokens=100,
            kl=kl,
            kl_per_512_tokens=512 * kl,
            kl_by_block=kl_by_block or dict.fromkeys(blocks, kl),
            kl_ablated=7.0,
            ce_clean=2.0,
            ce_spliced=3.0,
            ce_ablated=9.0,
            delta_ce=1.0,
            loss_recovered=loss_recovered,
            route_agreement=1.0,
        )
    return SweepRow(
        name=f"{label} seed={seed}",
        label=label,
        seed=seed,
        architecture="route_topk",
        blocks=blocks,
        d_sae=128,
        n_parameters=n_parameters,
        settings=SweepSettings(),
        reconstruction=reconstruction,
        downstream=downstream,
    )


def counts(run: Run, **changes: Any) -> FeatureCounts:
    """Features of one run: 60, 50, 40, 30, 20 and 10 above the thresholds, 40 where read."""
    fields: dict[str, Any] = {
        "thresholds": [8 * share for share in THRESHOLD_SHARES],
        "read_at": THRESHOLD_SHARES.index(0.2),
        "n_features": [60, 50, 40, 30, 20, 10],
        "surface_scores": [None, None, 0.7, None, None, None],
        "judge_score": None,
        "more_than_4_contexts": 35,
        "at_most_32_classes": 38,
    }
    return FeatureCounts(run, **{**fields, **changes})


def planned(k: int = K) -> list[Run]:
    """The runs of a reproduction, twins included."""

    def over_seeds(method: Method, stage: Any) -> list[Run]:
        return [Run(method.label, k, seed, stage) for seed in SEEDS]

    runs = [
        run
        for method in METHODS
        for run in over_seeds(method, "differences" if method.is_difference else "main")
    ]
    runs += [Run(method.label, OTHER_K, 0, "sparsity") for method in METHODS if method.is_traded]
    for method in METHODS:
        runs += over_seeds(method, "share_matched") if method.has_twin else []
    return runs


def shown_feature(feature: int, share_by_block: dict[int, float], **changes: Any) -> ShownFeature:
    mean_block = sum(block * share for block, share in share_by_block.items())
    profile = FeatureProfile(
        feature=feature,
        interpretable=True,
        n_contexts=8,
        n_classes=4,
        n_fired=20,
        density=0.2,
        max_activation=3.0,
        mean_activation=1.5,
        n_fired_by_block={block: int(20 * share) for block, share in share_by_block.items()},
        share_by_block=share_by_block,
        mean_block=mean_block,
        block_entropy=0.3,
        depth="deep",
    )
    activation_by_block = {block: float(block) for block in share_by_block}
    contexts = ["a | b <ACTIVATED>c</ACTIVATED> `d`", "<ACTIVATED>c</ACTIVATED>"]
    fields = {"kind": "word", "activation_by_block": activation_by_block, "contexts": contexts}
    return ShownFeature(profile=profile, **{**fields, **changes})


def made_result(
    rows: Mapping[Run, Mapping[str, Any]] | None = None,
    features: Mapping[Run, Mapping[str, Any]] | None = None,
    *,
    depths: list[FeatureDepth] | None = None,
    **settings: Any,
) -> ReproductionResult:
    """A reproduction whose numbers are those of `row` and `counts`, except for these changes.

    Args:
        rows: Changes of `row` by run.
        features: Changes of `counts` by run.
        depths: Of the features.
        settings: Changes of the settings.
    """
    rows, features = rows or {}, features or {}
    trained = []
    runs = planned(settings.get("k", K))
    for run in runs:
        kl = {"kl": None} if run.method == SOFT.label else {}
        trained.append(Trained(run, row(run.method, seed=run.seed, **{**kl, **rows.get(run, {})})))
    fields = {
        "model_name": "tiny",
        "dataset_path": "text",
        "routed_blocks": BLOCKS,
        "d_in": 64,
        "d_sae": 128,
        "k": K,
        "other_ks": [OTHER_K],
        "seeds": SEEDS,
        "without": [],
        "training_tokens": 1000,
        "step_tokens": 10,
        "lr": 1e-3,
        "dead_feature_window": 25,
        "eval_tokens": 100,
        "feature_tokens": 100,
        "read_share": 0.2,
        "search_tokens": 250,
        "torch": "2",
    }
    main = [run for run in runs if run.stage in ("main", "sparsity")]
    routers = [method.label for method in METHODS if method.has_twin]
    scaled = (ROUTE.label, PLAIN_MSE.label)
    return ReproductionResult(
        settings=Settings(**{**fields, **settings}),
        learning_rates=[RateTrial(ROUTE.label, lr, 0.5) for lr in (0.001, 0.002)],
        trained=trained,
        training_shares=[
            TrainingShares(run, {2: 0.125, 5: 0.25, 9: 0.625})
            for run in main
            if run.method in routers and run.stage == "main"
        ],
        features=Features(
            counts=[counts(run, **features.get(run, {})) for run in main],
            depths=depths or [],
            shown=[shown_feature(7, {2: 0.0, 5: 0.1, 9: 0.9}, kind="pattern")],
            steering=[
                SteeringExample(7, ["cat"], "7:set:1.5x", "The | a", "dog", "cat\ncat", 0, 2, 0.25)
            ],
        ),
        unscaled=[
            SpliceScales(run, 0.25, 1.5, 1.75)
            for run in main
            if run.method in scaled and run.stage == "main"
        ],
        seconds=60.0,
    )
