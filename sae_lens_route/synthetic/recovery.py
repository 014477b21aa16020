"""Which known features the latents of a dictionary recover.

1. *Match.* Each feature gets one latent, so that the sum of the cosines of their directions is
   largest (Hungarian algorithm). The mean of these cosines is the MCC of SAELens, but signed:
   latents are not negative, so the opposite of a direction is not the feature.
2. *Recovered* are features whose latent has a cosine of at least `RECOVERED`.
3. *F1.* The latent as a classifier of tokens, active or not: against whether the feature is active
   at the block where the dictionary read the token, and against whether it fires at all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, Shaped
from sae_lens.synthetic import cosine_similarities, feature_uniqueness
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sae_lens_route.saes.kinds import is_crosscoder
from sae_lens_route.synthetic.streams import DEPTHS

RECOVERED = 0.7
"""The least cosine of a latent that recovers a feature, as of twins (`evals/agreement.py`)."""


class Matching(NamedTuple):
    """The latent of each feature, one to one."""

    latent: Int[Tensor, " F"]
    """-1 where there are fewer latents than features, and none is left."""
    cosine: Float[Tensor, " F"]
    """Of the two directions; 0 where there is no latent."""
    largest: Float[Tensor, " F"]
    """The largest cosine with any latent, which several features may share."""


class DepthScores(NamedTuple):
    """Means over the features of a depth class, or over all features."""

    n_features: int
    recovered: float
    """Share of the features whose latent has a cosine of at least .7."""
    mean_cosine: float
    """Mean cosine of matched directions: the MCC."""
    f1_read: float | None
    """F1 of the latents against activity at the blocks that were read; over features that were
    active there at least once; null if none was."""
    f1_anywhere: float
    """F1 of the latents against firing at any block."""


def decoder_rows(sae: Any) -> Float[Tensor, "d_sae d"]:
    """The direction of each latent; of a crosscoder, at the block where its decoder is largest."""
    rows = sae.W_dec.detach()
    if not is_crosscoder(sae):
        return rows
    by_block = rearrange(rows, "d_sae (L d) -> d_sae L d", L=sae.cfg.n_routed_layers)
    return by_block[torch.arange(len(rows)), sae.decoder_block_norms().argmax(-1)]


def match_latents(rows: Float[Tensor, "d_sae d"], directions: Float[Tensor, "F d"]) -> Matching:
    """The one-to-one matching of features and latents with the largest sum of cosines."""
    cosines = cosine_similarities(directions, rows)
    feature, latent = map(torch.as_tensor, linear_sum_assignment(cosines.numpy(), maximize=True))
    latents = torch.full((len(directions),), -1)
    latents[feature] = latent
    cosine = torch.zeros(len(directions), dtype=cosines.dtype)
    cosine[feature] = cosines[feature, latent]
    return Matching(latents, cosine, cosines.amax(-1))


def uniqueness(
    rows: Float[Tensor, "d_sae d"],
    directions: Float[Tensor, "F d"],
    alive: Bool[Tensor, " d_sae"],
) -> float:
    """Features that are nearest to some living latent, over living latents (SAELens's measure)."""
    return feature_uniqueness(rows[alive], directions)


class FiringCounts:
    """Counts of how matched latents classify tokens, over batches.

    Args:
        matching: The latent of each feature.
    """

    def __init__(self, matching: Matching) -> None:
        self.matching = matching
        self.read, self.anywhere = (torch.zeros(3, len(matching.latent)) for _ in range(2))

    def matched(self, by_latent: Shaped[Tensor, "tokens d_sae"]) -> Shaped[Tensor, "tokens F"]:
        """The columns of the matched latents."""
        return by_latent[:, self.matching.latent.clamp(min=0)]

    def add(
        self,
        acts: Float[Tensor, "tokens d_sae"],
        active_where_read: Bool[Tensor, "tokens F"],
        fires: Bool[Tensor, "tokens F"],
    ) -> None:
        """Add a batch: activations of the latents, and the truth in two senses."""
        found = (self.matched(acts) > 0) & (self.matching.latent >= 0)
        for counts, truth in ((self.read, active_where_read), (self.anywhere, fires)):
            parts = (found & truth, found & ~truth, ~found & truth)
            counts += torch.stack([part.sum(0) for part in parts])

    def f1(self) -> tuple[Float[Tensor, " F"], Float[Tensor, " F"]]:
        """F1 of each feature where read and anywhere; NaN where it was never active."""
        return _f1(self.read), _f1(self.anywhere)


def _f1(counts: Float[Tensor, "3 F"]) -> Float[Tensor, " F"]:
    found, wrong, missed = counts
    f1 = 2 * found / (2 * found + wrong + missed).clamp(min=1)
    return torch.where(found + missed > 0, f1, torch.nan)


def depth_scores(
    counts: FiringCounts, depth: Int[Tensor, " F"]
) -> tuple[DepthScores, dict[str, DepthScores]]:
    """Scores of all features, and by depth class."""
    cosine, (f1_read, f1_anywhere) = counts.matching.cosine, counts.f1()

    def of(chosen: Bool[Tensor, " F"]) -> DepthScores:
        read = f1_read[chosen].nanmean()
        return DepthScores(
            n_features=int(chosen.sum()),
            recovered=float((cosine[chosen] >= RECOVERED).float().mean()),
            mean_cosine=float(cosine[chosen].mean()),
            f1_read=None if read.isnan() else float(read),
            f1_anywhere=float(f1_anywhere[chosen].nanmean()),
        )

    by_depth = {name: of(depth == i) for i, name in enumerate(DEPTHS)}
    return of(torch.ones_like(depth, dtype=torch.bool)), by_depth
