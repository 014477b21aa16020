"""All scores of a dictionary of synthetic streams, in one pass over tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from sae_lens.synthetic import DeadLatentsCalculator

from sae_lens_route.evals.concept_readers import MultiLayerReader
from sae_lens_route.evals.reconstruction import (
    CrosscoderSums,
    ReconstructionMetrics,
    ReconstructionSums,
)
from sae_lens_route.saes.kinds import is_crosscoder
from sae_lens_route.saes.routed import uniform_draws, with_routes
from sae_lens_route.synthetic.dictionaries import SyntheticDictionary
from sae_lens_route.synthetic.recovery import (
    DepthScores,
    FiringCounts,
    decoder_rows,
    depth_scores,
    match_latents,
    uniqueness,
)
from sae_lens_route.synthetic.routers import Choice, MassSums, RouterScores
from sae_lens_route.synthetic.streams import Sample, SyntheticStreams


class SyntheticScores(NamedTuple):
    """How well a dictionary, and its router, find features that are known."""

    n_tokens: int
    norm_mse: float
    """In units of n(x); of a multi-layer SAE and a crosscoder, mean over blocks."""
    l0: float
    """Active latents per vector that is encoded."""
    dead_latents: int
    """Latents that are never active where the dictionary reads."""
    mean_max_cosine: float
    """Mean over features of the largest cosine with any latent."""
    uniqueness: float
    """Features that are nearest to some living latent, over living latents."""
    overall: DepthScores
    by_depth: dict[str, DepthScores]
    router: RouterScores | None
    """Null where the dictionary does not choose among blocks."""


@torch.no_grad()
def score_dictionary(
    streams: SyntheticStreams, dictionary: SyntheticDictionary, samples: Iterable[Sample]
) -> SyntheticScores:
    """Score a dictionary on tokens of the streams that it was trained on.

    A crosscoder and a multi-layer SAE read all blocks, so that what is active where they read is
    what is active anywhere.
    """
    reader, blocks = dictionary.reader, torch.tensor(dictionary.blocks)
    sae: Any = reader.sae
    reads_at_once: bool = is_crosscoder(reader.sae)
    reads_all = reads_at_once or isinstance(reader, MultiLayerReader)
    rows = decoder_rows(sae)
    counts = FiringCounts(match_latents(rows, streams.directions))
    sums = CrosscoderSums(sae) if reads_at_once else ReconstructionSums(sae)
    dead, mass = DeadLatentsCalculator(len(rows)), MassSums()
    draw = uniform_draws(sae)
    for sample in samples:
        x, fires = sample.streams[:, blocks], sample.firing > 0
        drawn = sample.best_block if dictionary.oracle else draw(x.shape[:-2])
        with with_routes(sae, drawn):
            acts, routes = reader.activations(x)
            sums.add(x)
        dead.add_batch(acts)
        read_at = blocks[routes]
        if reads_all:
            counts.add(acts, fires, fires)
        else:
            at = counts.matched(read_at)
            counts.add(acts, streams.fires_at(sample.firing, at), fires)
            mass.add(sample.mass, read_at[:, 0])
    metrics = sums.metrics()
    overall, by_depth = depth_scores(counts, streams.depth)
    chooses = not reads_all and len(blocks) == streams.cfg.n_blocks
    choice = Choice.of_norm_mse(metrics) if isinstance(metrics, ReconstructionMetrics) else None
    return SyntheticScores(
        n_tokens=metrics.n_tokens,
        norm_mse=choice.uniform if reads_all and choice is not None else metrics.norm_mse,
        l0=metrics.l0,
        dead_latents=dead.compute(),
        mean_max_cosine=float(counts.matching.largest.mean()),
        uniqueness=uniqueness(rows, streams.directions, dead.latent_ever_fired),
        overall=overall,
        by_depth=by_depth,
        router=mass.scores(choice) if chooses and choice is not None else None,
    )
