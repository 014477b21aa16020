"""Residual streams whose features are known, and appear, persist and vanish with depth.

1. *Features.* SAELens's `SyntheticModel` draws a unit direction d_f for each feature, how often it
   fires (Zipf), how strongly (z_f), and correlations or a hierarchy among features. A feature that
   fires at a token has the same z_f at all blocks.
2. *Depth.* Its amplitude a_f(l) rises to 1 over `ramp` blocks, stays there and falls to 0 again.
   Early features are there from the first block and vanish in the first half; late ones are their
   mirror image; middle ones have vanished at both ends; persistent ones never change.
3. *Streams.*   x_l = norm_growth^l (sum_f a_f(l) z_f d_f + mean_l + dense + noise_l)
   mean_l is the same at all tokens and turns with depth; dense is a Gaussian in a few directions,
   the same at all blocks; noise_l is independent at each coordinate, token and block.

All directions have mean 0 over d, so that n(x), which subtracts it, leaves them as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from sae_lens.synthetic import (
    FeatureDictionary,
    SyntheticModel,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
)
from sae_lens.util import temporary_seed
from torch import Tensor

from sae_lens_route.errors import UserError

DEPTHS = ("early", "middle", "late", "persistent")
"""Classes of features by the blocks they are active at, each with a quarter of the features."""

_MIN_BLOCKS = 4


def _features() -> SyntheticModelConfig:
    return SyntheticModelConfig(
        num_features=512,
        hidden_dim=128,
        firing_probability=ZipfianFiringProbabilityConfig(0.7, max_prob=0.25, min_prob=0.025),
        std_firing_magnitudes=0.2,
    )


@dataclass(frozen=True)
class SyntheticStreamsConfig:
    """What the streams are made of.

    Args:
        features: Number of features, width of the streams, firing, magnitudes, correlations and
            hierarchy. Its bias is left out and its seed replaced.
        n_blocks: L, at least 4.
        ramp: Blocks with an amplitude between 0 and 1 where a feature appears or vanishes.
        norm_growth: Factor of the stream's norm from one block to the next.
        mean_norm: Norm of mean_l.
        mean_turn: Angle in radians between mean_l of the first block and of the last.
        n_dense: Directions of dense.
        dense_std: Standard deviation along each of them.
        noise_std: Standard deviation of each coordinate of the noise.
        seed: Of directions, depths and firing probabilities, not of the tokens.
    """

    features: SyntheticModelConfig = field(default_factory=_features)
    n_blocks: int = 8
    ramp: int = 1
    norm_growth: float = 1.25
    mean_norm: float = 3.0
    mean_turn: float = math.pi / 4
    n_dense: int = 2
    dense_std: float = 1.0
    noise_std: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_blocks < _MIN_BLOCKS:
            raise UserError(
                f"n_blocks={self.n_blocks}: at least {_MIN_BLOCKS} are needed for early, middle "
                "and late features"
            )
        if self.ramp < 0:
            raise UserError(f"ramp={self.ramp}: must be >= 0")


class Sample(NamedTuple):
    """Tokens with their ground truth."""

    streams: Float[Tensor, "tokens L d"]
    """Residual streams after each block."""
    firing: Float[Tensor, "tokens F"]
    """z: the magnitude of each feature where its amplitude is 1; 0 where it does not fire."""
    mass: Float[Tensor, "tokens L"]
    """`sum_f (a_f(l) z_f)^2`: what the features contribute to the squared norm at each block,
    before the norm grows, and but for the overlap of their directions."""

    @property
    def best_block(self) -> Int[Tensor, " tokens"]:
        """The block with the largest mass."""
        return self.mass.argmax(-1)


class SyntheticStreams:
    """A generator of residual streams with known features.

    Args:
        cfg: What the streams are made of; the same configuration gives the same features.

    Attributes:
        amplitude: `[F, L]`, a_f(l).
        depth: `[F]`, index into `DEPTHS` of each feature.
        mean: `[L, d]`, mean_l.
        dense: `[n_dense, d]`, unit directions.
    """

    def __init__(self, cfg: SyntheticStreamsConfig) -> None:
        self.cfg = cfg
        self.model = SyntheticModel(replace(cfg.features, bias=False, seed=cfg.seed))
        directions = self.features.feature_vectors.data
        directions.copy_(_unit(directions))
        n_features, d = directions.shape
        generator = torch.Generator().manual_seed(cfg.seed)
        self.depth = _depths(n_features, generator)
        start, stop = _plateaus(self.depth, cfg.n_blocks, generator)
        self.amplitude = _amplitudes(start, stop, cfg.n_blocks, cfg.ramp)
        first, last = _unit(torch.randn(2, d, generator=generator))
        last = _unit(last - (last @ first) * first)
        angle = torch.linspace(0, cfg.mean_turn, cfg.n_blocks).unsqueeze(-1)
        self.mean = cfg.mean_norm * (angle.cos() * first + angle.sin() * last)
        self.dense = _unit(torch.randn(cfg.n_dense, d, generator=generator))

    @property
    def features(self) -> FeatureDictionary:
        """The directions, as SAELens keeps them."""
        return self.model.feature_dict

    @property
    def directions(self) -> Float[Tensor, "F d"]:
        """d_f, unit vectors."""
        return self.features.feature_vectors.data

    @torch.no_grad()
    def sample(self, n_tokens: int) -> Sample:
        """Draw tokens from torch's global generator."""
        cfg, n_blocks = self.cfg, self.cfg.n_blocks
        z = self.model.activation_generator.sample(n_tokens)
        same = cfg.dense_std * torch.randn(n_tokens, cfg.n_dense) @ self.dense
        x = cfg.noise_std * torch.randn(n_tokens, n_blocks, self.directions.shape[-1])
        for block, amplitude in enumerate(self.amplitude.T):
            x[:, block] += self.features(z * amplitude) + self.mean[block] + same
        x *= cfg.norm_growth ** torch.arange(n_blocks).unsqueeze(-1)
        return Sample(x, z, z.square() @ self.amplitude.square())

    def batches(self, batch_size: int, seed: int) -> Iterator[Sample]:
        """Endless batches of tokens, which depend on the seed and on nothing else that is drawn."""
        seeds = torch.Generator().manual_seed(seed)
        while True:
            with temporary_seed(int(torch.randint(2**62, (), generator=seeds))):
                batch = self.sample(batch_size)
            yield batch

    def fires_at(
        self, firing: Float[Tensor, "tokens F"], blocks: Int[Tensor, "tokens F"]
    ) -> Bool[Tensor, "tokens F"]:
        """Whether each feature is active at a block: it fires and its amplitude there is not 0."""
        at = torch.arange(len(self.amplitude)).expand_as(blocks)
        return (firing > 0) & (self.amplitude[at, blocks] > 0)

    def true_l0(self, firing: Float[Tensor, "tokens F"]) -> Float[Tensor, " L"]:
        """Mean number of active features at each block, without the dense directions."""
        return ((firing > 0).float() @ (self.amplitude > 0).float()).mean(0)


def _unit(rows: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
    """With mean 0 over d and norm 1."""
    return torch.nn.functional.normalize(rows - rows.mean(-1, keepdim=True), dim=-1)


def _depths(n_features: int, generator: torch.Generator) -> Int[Tensor, " F"]:
    """A class for each feature; among four neighbors, which fire equally often, one of each."""
    n_groups = math.ceil(n_features / len(DEPTHS))
    return torch.rand(n_groups, len(DEPTHS), generator=generator).argsort(-1).flatten()[:n_features]


def _plateaus(
    depth: Int[Tensor, " F"], n_blocks: int, generator: torch.Generator
) -> tuple[Int[Tensor, " F"], Int[Tensor, " F"]]:
    """First and last block with an amplitude of 1, drawn uniformly within each class."""
    draws = torch.rand(2, len(depth), generator=generator)
    extent = (draws[0] * (n_blocks // 2 - 1)).long()  # 0 … L/2 - 2
    low, high = n_blocks // 4, n_blocks - 1 - n_blocks // 4
    inner = (low + draws * (high - low + 1)).long().sort(0).values
    zero, end = torch.zeros_like(extent), torch.full_like(extent, n_blocks - 1)
    start = torch.stack([zero, inner[0], end - extent, zero])
    stop = torch.stack([extent, inner[1], end, end])
    at = depth.unsqueeze(0)
    return start.gather(0, at).squeeze(0), stop.gather(0, at).squeeze(0)


def _amplitudes(
    start: Int[Tensor, " F"], stop: Int[Tensor, " F"], n_blocks: int, ramp: int
) -> Float[Tensor, "F L"]:
    block = torch.arange(n_blocks)
    before = (start.unsqueeze(-1) - block).clamp(min=0)
    after = (block - stop.unsqueeze(-1)).clamp(min=0)
    return (1 - (before + after) / (ramp + 1)).clamp(min=0)
