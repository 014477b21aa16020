"""The numbers of a reproduction, typed, as `reproduction.json` holds them.

Tables and figures are made from these alone, so they can be drawn again without training.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from sae_lens_route.evals.comparison import SweepRow
from sae_lens_route.features.table import FeatureProfile
from sae_lens_route.paper.methods import Method
from sae_lens_route.paper.plan import Run, Settings, Stage
from sae_lens_route.paper.steering_example import SteeringExample
from sae_lens_route.records import typed

THRESHOLD_SHARES = (0.1, 0.15, 0.2, 0.25, 0.331, 0.4)
"""Thresholds that features are counted at, as shares of sqrt(d_in); the paper's 15 is 0.331."""

Kind = Literal["word", "pattern"]
"""Among the features of the fewest token classes, or of the most."""


class RateTrial(NamedTuple):
    """A short run of one method at one learning rate."""

    method: str
    lr: float
    norm_mse: float
    """On validation text."""


@dataclass(frozen=True)
class OfRun:
    """Numbers of one run."""

    run: Run


@dataclass(frozen=True)
class Trained(OfRun):
    """A trained dictionary and its evaluation."""

    row: SweepRow


@dataclass(frozen=True)
class TrainingShares(OfRun):
    """Mean share of the tokens per block while a router was trained (Figure 9 a)."""

    share_by_block: dict[int, float]


@dataclass(frozen=True)
class SpliceScales(OfRun):
    """KL in nats per token with p on both sides of the SAE, and without p on either."""

    route_weight: float
    kl: float
    kl_unscaled: float


@dataclass(frozen=True)
class FeatureCounts(OfRun):
    """Interpretable features of one dictionary, and their scores, over several thresholds."""

    thresholds: list[float]
    """In units of n(x)."""
    read_at: int
    """Position of the threshold that features are read at."""
    n_features: list[int]
    """Features with at least 4 contexts above each threshold."""
    surface_scores: list[float | None]
    """Mean surface score at each threshold; None where it was not computed or has no features."""
    judge_score: float | None
    """Mean score of a judge model at the threshold features are read at."""
    more_than_4_contexts: int
    """Features that pass the rule of the paper's code, at the threshold features are read at."""
    at_most_32_classes: int
    """Features of at most 32 token classes, at the same threshold."""

    @property
    def n_read(self) -> int:
        """Features at the threshold they are read at."""
        return self.n_features[self.read_at]

    @property
    def surface_score(self) -> float | None:
        """Mean surface score at the threshold features are read at."""
        return self.surface_scores[self.read_at]


class FeatureDepth(NamedTuple):
    """How many token classes a feature fires on, and at which block on average."""

    n_classes: int
    mean_block: float


@dataclass(frozen=True)
class ShownFeature:
    """One feature of Figure 1."""

    kind: Kind
    profile: FeatureProfile
    activation_by_block: dict[int, float]
    """Mean activation on the tokens it fires on, had each token been read at that block."""
    contexts: list[str]


@dataclass(frozen=True)
class Features:
    """Features of every method, and where those of one dictionary live."""

    counts: list[FeatureCounts]
    depths: list[FeatureDepth]
    """All features of the dictionary with enough contexts."""
    shown: list[ShownFeature]
    steering: list[SteeringExample]
    """One of its features steered; empty if the rule found none."""

    @classmethod
    def of_groups(cls, groups: Sequence[Features]) -> Features:
        """All features of dictionaries that were read in groups."""
        return cls(
            [counts for group in groups for counts in group.counts],
            [depth for group in groups for depth in group.depths],
            [feature for group in groups for feature in group.shown],
            [example for group in groups for example in group.steering],
        )


def counted_shares(read_share: float) -> tuple[float, ...]:
    """The shares of sqrt(d_in) that features are counted at, ascending."""
    return tuple(sorted({*THRESHOLD_SHARES, read_share}))


@dataclass(frozen=True)
class ReproductionResult:
    """Everything a reproduction measured.

    Args:
        settings: The settings it was made with.
        learning_rates: What was tried to find the rate of each method.
        trained: Every dictionary, of every stage.
        training_shares: Of the routers of the main comparison.
        features: Of every dictionary except the variants and the twins.
        unscaled: Both scales of the splice, for some methods of the main comparison.
        seconds: Wall-clock time of all stages.
    """

    settings: Settings
    learning_rates: list[RateTrial]
    trained: list[Trained]
    training_shares: list[TrainingShares]
    features: Features
    unscaled: list[SpliceScales]
    seconds: float

    def at_sparsities(self, method: Method) -> list[tuple[Trained, FeatureCounts]]:
        """A method's dictionaries of the first seed, ascending by k, with their features."""
        features = {counts.run: counts for counts in self.features.counts}
        return sorted(
            (
                (each, features[each.run])
                for each in of_method(self.trained, method, "main", "sparsity")
                if each.run.seed == self.settings.seeds[0]
            ),
            key=lambda pair: pair[0].run.k,
        )

    @classmethod
    def read(cls, path: Path) -> ReproductionResult:
        """Read a `reproduction.json`."""
        return typed(cls, json.loads(path.read_text()))


Numbers = TypeVar("Numbers", bound=OfRun)


def of_method(numbers: Iterable[Numbers], method: Method, *stages: Stage) -> list[Numbers]:
    """The numbers of a method's runs in these stages, in order."""
    return [
        each for each in numbers if each.run.method == method.label and each.run.stage in stages
    ]
