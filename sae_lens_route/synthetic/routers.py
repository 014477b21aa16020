"""How well a router chooses, against the best block of each token, chance, and its own shares.

A choice is measured twice: by the mass of the active features at the block that it reads, and by
the NormMSE of the same dictionary there (`evals/reconstruction.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from sae_lens_route.evals.reconstruction import ReconstructionMetrics


class Choice(NamedTuple):
    """One measure under four routers, mean over tokens."""

    routed: float
    """Under the router. A NormMSE is of all tokens, those of the others of one in four."""
    matched: float
    """Under a random router with the same share of tokens at each block."""
    uniform: float
    """Under a random router with equal shares."""
    oracle: float
    """At the best block of each token."""

    @classmethod
    def of_norm_mse(cls, metrics: ReconstructionMetrics) -> Choice:
        """The NormMSE of a dictionary at the blocks that each would choose."""
        return cls(
            metrics.norm_mse,
            metrics.norm_mse_matched,
            metrics.norm_mse_uniform,
            metrics.norm_mse_best,
        )

    @property
    def gain(self) -> float:
        """How far the router gets from chance, 0, to the oracle, 1."""
        return (self.routed - self.uniform) / (self.oracle - self.uniform)

    @property
    def gain_at_shares(self) -> float:
        """How far it gets from a random router with its shares, 0, to the oracle, 1."""
        return (self.routed - self.matched) / (self.oracle - self.matched)


class RouterScores(NamedTuple):
    """What a router does with tokens whose features are known."""

    share_by_block: dict[int, float]
    best_block: Choice
    """Share of the tokens that are read at the block with the largest mass of active features."""
    mass: Choice
    """Mass of the active features at the block that is read, over that at the best block."""
    norm_mse: Choice
    """NormMSE of the dictionary."""


class MassSums:
    """Running sums of the mass at the blocks that a router chooses."""

    def __init__(self) -> None:
        self.n = 0
        self.routed = self.chosen = self.fixed = torch.zeros(())

    def add(self, mass: Float[Tensor, "tokens L"], blocks: Int[Tensor, " tokens"]) -> None:
        """Add a batch: mass of the active features at each block, and the block that was read."""
        best = mass.amax(-1, keepdim=True)
        # where nothing fires no block is worse than another
        measures = torch.where(best > 0, torch.stack([mass == best, mass / best]), 1.0).double()
        chosen = one_hot(blocks, mass.shape[-1]).double()
        self.n += len(mass)
        self.chosen = self.chosen + chosen.sum(0)
        self.fixed = self.fixed + measures.sum(1)
        self.routed = self.routed + (measures * chosen).sum((1, 2))

    def scores(self, norm_mse: Choice) -> RouterScores:
        """Scores of all tokens added so far, given the NormMSE of the same tokens."""
        shares = self.chosen / self.n
        routed, fixed = self.routed / self.n, self.fixed / self.n
        best_block, mass = (
            Choice(float(value), float((shares * by_block).sum()), float(by_block.mean()), 1.0)
            for value, by_block in zip(routed, fixed, strict=True)
        )
        return RouterScores(dict(enumerate(shares.tolist())), best_block, mass, norm_mse)
