"""Features of every kind of dictionary, against a count over tokens and classes by hand.

The counts are whole numbers, so they must be equal; mean activations are sums of float32 numbers
over a few hundred tokens, compared with float64 to 1e-4.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from sae_lens.saes.sae import SAEMetadata
from support.brute_force import Routed, encoded, normalized, routed
from support.small import TINYLLAMA_WIDTH, small_config

from sae_lens_route.paper.feature_stage import read_features
from sae_lens_route.paper.methods import ASSIGNMENT, CROSSCODER_TOPK, ROUTE, SOFT
from sae_lens_route.paper.plan import Reproduction, Run
from sae_lens_route.paper.results import THRESHOLD_SHARES, FeatureCounts, Features
from sae_lens_route.saes import (
    RouteTopKSAE,
    RouteTopKSAEConfig,
    TopKCrosscoder,
    TopKCrosscoderConfig,
)

BLOCKS, K, D_SAE = [2, 5, 9], 12, 64
READ_AT = 2
"""Position among the thresholds of the one that features are read at."""

ROUTERS = {ROUTE.label: {}, ASSIGNMENT.label: {}, SOFT.label: {"routing": "soft"}}


def random_sae(label: str, seed: int) -> Any:
    torch.manual_seed(seed)
    size = {"d_sae": D_SAE, "k": K, "n_routed_layers": len(BLOCKS)}
    if label == CROSSCODER_TOPK.label:
        width = len(BLOCKS) * TINYLLAMA_WIDTH
        sae = TopKCrosscoder(TopKCrosscoderConfig(d_in=width, **size))
    else:
        sae = RouteTopKSAE(RouteTopKSAEConfig(d_in=TINYLLAMA_WIDTH, **size, **ROUTERS[label]))
        sae.W_router.data.normal_(std=0.01)  # p near 1/3: features scaled by it would be lost
    sae.W_enc.data.normal_(std=0.25 * (TINYLLAMA_WIDTH / sae.cfg.d_in) ** 0.5)
    sae.b_enc.data.normal_(std=0.02)  # with which z(p n) / p is not z(n)
    sae.W_enc.data *= torch.linspace(0.1, 1, D_SAE)  # some features are strong, some weak
    sae.cfg.metadata = SAEMetadata(
        hook_names=[f"blocks.{block}.hook_resid_post" for block in BLOCKS],
        routed_blocks=BLOCKS,
        exclude_special_tokens=[0],
    )
    return sae


class Read(NamedTuple):
    model: Any
    tokens: torch.Tensor
    saes: dict[Run, Any]
    features: Features


@pytest.fixture(scope="module")
def read(tinyllama: Any) -> Read:
    """48 contexts of BOS and 15 tokens out of 45."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(100, 145, (48, 16), generator=generator)
    tokens[:, 0] = 0
    labels = [*ROUTERS, CROSSCODER_TOPK.label]
    saes = {Run(label, K, 0): random_sae(label, i) for i, label in enumerate(labels)}
    cfg = small_config(None, routed_blocks=BLOCKS)
    reproduction = Reproduction(cfg, K, (), (0,), tokens, 0, 0, Path("unused"), read_share=0.2)
    groups = [dict(list(saes.items())[part]) for part in (slice(0, 1), slice(1, None))]
    features = [read_features(reproduction, tinyllama, tokens, group) for group in groups]
    assert not features[0].shown and not features[0].depths  # without the assignment router
    return Read(tinyllama, tokens, saes, Features.of_groups(features))


class Counted(NamedTuple):
    """Activations of a dictionary by hand."""

    acts: np.ndarray
    """[kept tokens, d_sae], in units of n(x)."""
    streams: np.ndarray
    """[kept tokens, L, d]."""
    at: list[Routed]
    classes: list[str]
    """Token class of each kept token."""

    def contexts(self, feature: int, threshold: float) -> tuple[int, int]:
        """Contexts, at most two of each class, and classes."""
        by_class: dict[str, int] = defaultdict(int)
        for name, value in zip(self.classes, self.acts[:, feature], strict=True):
            by_class[name] += int(value > threshold)
        kept = [min(2, n) for n in by_class.values() if n]
        return sum(kept), len(kept)


def counted(read: Read, run: Run) -> Counted:
    sae = read.saes[run]
    _, cache = read.model.run_with_cache(read.tokens)
    names = [f"blocks.{block}.hook_resid_post" for block in BLOCKS]
    kept = read.tokens != 0
    streams = torch.stack([cache[name] for name in names], dim=2)[kept].double().numpy()
    if run.method == CROSSCODER_TOPK.label:
        at = []
        inputs = [np.concatenate([normalized(x) for x in token]) for token in streams]
    else:
        at = [routed(sae, list(token), None) for token in streams]
        inputs = [r.x_route for r in at]
    scales = [1.0 if run.method == SOFT.label else r.weight for r in at] or [1.0] * len(inputs)
    raw = read.model.tokenizer.convert_ids_to_tokens(read.tokens[kept].tolist())
    acts = np.stack([encoded(sae, x) / p for x, p in zip(inputs, scales, strict=True)])
    return Counted(acts, streams, at, [token.strip().lower() for token in raw])


def counts_of(read: Read, run: Run) -> FeatureCounts:
    (found,) = [counts for counts in read.features.counts if counts.run == run]
    return found


@pytest.mark.parametrize("label", [*ROUTERS, CROSSCODER_TOPK.label])
def test_features_are_counted_in_the_units_of_n(read: Read, label: str) -> None:
    """Not scaled by p, which would leave fewer above each threshold."""
    run = Run(label, K, 0)
    hand, found = counted(read, run), counts_of(read, run)
    thresholds = [share * TINYLLAMA_WIDTH**0.5 for share in THRESHOLD_SHARES]
    assert found.thresholds == pytest.approx(thresholds)
    table = [[hand.contexts(feature, at) for feature in range(D_SAE)] for at in thresholds]
    assert found.n_features == [sum(n >= 4 for n, _ in line) for line in table]
    assert len(set(found.n_features)) > 3  # so one threshold cannot pass for another
    assert found.more_than_4_contexts == sum(n > 4 for n, _ in table[READ_AT])
    at_most_32 = sum(n >= 4 and n_classes <= 32 for n, n_classes in table[READ_AT])
    assert found.at_most_32_classes == at_most_32


def test_no_rule_can_pass_for_another(read: Read) -> None:
    counts = read.features.counts
    assert any(each.n_read > each.more_than_4_contexts for each in counts)
    assert any(each.n_read > each.at_most_32_classes for each in counts)
    assert any(each.at_most_32_classes != each.more_than_4_contexts for each in counts)


def test_only_the_routesae_has_scores_at_every_threshold(read: Read) -> None:
    assert None not in counts_of(read, Run(ROUTE.label, K, 0)).surface_scores
    scores = counts_of(read, Run(SOFT.label, K, 0)).surface_scores
    assert [score is not None for score in scores] == [i == READ_AT for i in range(6)]
    assert counts_of(read, Run(SOFT.label, K, 0)).judge_score is None


def test_words_fire_on_the_fewest_classes_and_patterns_on_the_most(read: Read) -> None:
    """Among the features with at least 8 contexts, from the assignment router's dictionary."""
    hand = counted(read, Run(ASSIGNMENT.label, K, 0))
    threshold = 0.2 * TINYLLAMA_WIDTH**0.5
    by_feature = {feature: hand.contexts(feature, threshold) for feature in range(D_SAE)}
    enough = [feature for feature, (n, _) in by_feature.items() if n >= 8]
    assert 10 < len(enough) < sum(n >= 4 for n, _ in by_feature.values())
    order = sorted(enough, key=lambda f: (by_feature[f][1], -hand.acts[:, f].max()))
    shown = read.features.shown
    assert [s.profile.feature for s in shown if s.kind == "word"] == order[:5]
    assert [s.profile.feature for s in shown if s.kind == "pattern"] == order[::-1][:5]
    assert len(shown) == 10 and all(1 <= len(s.contexts) <= 3 for s in shown)


def test_depths_are_of_the_features_with_enough_contexts(read: Read) -> None:
    hand = counted(read, Run(ASSIGNMENT.label, K, 0))
    blocks = np.array([BLOCKS[r.route] for r in hand.at])
    expected = []
    for feature in range(D_SAE):
        n, n_classes = hand.contexts(feature, 0.2 * TINYLLAMA_WIDTH**0.5)
        if n >= 8:
            expected.append((n_classes, float(blocks[hand.acts[:, feature] > 0].mean())))
    found = sorted((depth.n_classes, depth.mean_block) for depth in read.features.depths)
    assert len({round(block, 3) for _, block in expected}) > 3
    np.testing.assert_allclose(found, sorted(expected), rtol=1e-9)


def test_activations_by_block_are_means_over_the_tokens_it_fires_on(read: Read) -> None:
    run = Run(ASSIGNMENT.label, K, 0)
    hand, sae = counted(read, run), read.saes[run]
    for shown in (read.features.shown[0], read.features.shown[-1]):
        feature = shown.profile.feature
        fired = [
            (x, r.weight)
            for x, acts, r in zip(hand.streams, hand.acts, hand.at, strict=True)
            if acts[feature]
        ]
        expected = {
            block: float(
                np.mean([encoded(sae, p * normalized(x[i]))[feature] / p for x, p in fired])
            )
            for i, block in enumerate(BLOCKS)
        }
        assert shown.activation_by_block == pytest.approx(expected, rel=1e-4)
        assert len(set(shown.activation_by_block.values())) == 3
