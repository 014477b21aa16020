"""Features of every dictionary over the same held-out text, read in one pass.

Activations are in units of n(x) (`saes/units.py`): otherwise one threshold would not suit methods
whose p differ. A crosscoder's are those of its concatenated blocks.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_route.data.reading import Text, activation_batches
from sae_lens_route.features.contexts import ContextCollector
from sae_lens_route.features.judge import Judge
from sae_lens_route.features.surface_score import surface_ranking
from sae_lens_route.features.table import ContextOptions, FeatureProfile, FeatureTable
from sae_lens_route.models.kinds import LanguageModel, tokenizer_of
from sae_lens_route.paper.methods import ASSIGNMENT, ROUTE, shown_in
from sae_lens_route.paper.plan import Reproduction, Run
from sae_lens_route.paper.results import (
    FeatureCounts,
    FeatureDepth,
    Features,
    Kind,
    ShownFeature,
    counted_shares,
)
from sae_lens_route.paper.steering_example import steering_example
from sae_lens_route.saes.kinds import is_crosscoder
from sae_lens_route.saes.metadata import routed_blocks
from sae_lens_route.saes.routed import RoutedSAEMixin, uniform_draws, with_routes
from sae_lens_route.saes.router import normalize
from sae_lens_route.saes.units import in_units

_MIN_CONTEXTS = 8
"""Contexts that a feature needs to have a depth worth comparing."""

_SHOWN = 5
"""Features shown of each kind."""

_SHOWN_CONTEXTS = 3


@torch.no_grad()
def read_features(
    reproduction: Reproduction, model: LanguageModel, text: Text, saes: Mapping[Run, SAE[Any]]
) -> Features:
    """Interpretable features of every dictionary with their scores, and their blocks (Figure 1).

    Args:
        reproduction: Number of tokens, threshold, judge.
        model: The model the SAEs were trained on.
        text: What is read.
        saes: Trained SAEs. Blocks are those of the assignment router's of the first seed, and there
            are none if it is not among them.
    """
    norm, read_share = reproduction.cfg.sae.d_in**0.5, reproduction.read_share
    thresholds = tuple(share * norm for share in counted_shares(read_share))
    options = ContextOptions(read_share * norm, thresholds)
    collectors = {
        run: ContextCollector.of(sae, tokenizer_of(model), options) for run, sae in saes.items()
    }
    draws = {run: uniform_draws(sae) for run, sae in saes.items()}
    shown = Run(ASSIGNMENT.label, reproduction.k, reproduction.seeds[0])
    by_block = _ActivationByBlock(saes[shown]) if shown in saes else None
    beginning = ""
    batches = activation_batches(
        model,
        list(saes.values()),
        text,
        max_tokens=reproduction.feature_tokens,
        description="reading features",
    )
    for batch in batches:
        beginning = beginning or _decoded(model, batch.tokens[0])
        for run, sae in saes.items():
            streams = batch.of(sae)
            with with_routes(sae, draws[run](batch.tokens.shape)):
                read = _read(sae, streams)
            collectors[run].add(batch.tokens, read.acts, read.route, read.weight, batch.kept)
            if by_block is not None and run == shown:
                by_block.add(streams, read, batch.kept)
    counts = [
        _counts(reproduction, run, collector)
        for run, collector in tqdm(collectors.items(), "ranking features")
    ]
    if by_block is None:
        return Features(counts, [], [], [])
    table = collectors[shown].table()
    example = steering_example(model, by_block.sae, table, beginning)
    steering = [] if example is None else [example]
    return Features(counts, *_blocks_of_features(table, by_block), steering)


def _decoded(model: LanguageModel, tokens: Int[Tensor, " pos"]) -> str:
    """Text of a context, without special tokens."""
    tokenizer: Any = tokenizer_of(model)
    return tokenizer.decode(tokens.tolist(), skip_special_tokens=True)


class _Read(NamedTuple):
    acts: Float[Tensor, "batch pos d_sae"]
    """In units of n(x)."""
    route: Int[Tensor, "batch pos"]
    weight: Float[Tensor, "batch pos"]


def _read(sae: SAE[Any], streams: Float[Tensor, "batch pos L d"]) -> _Read:
    """Feature activations with each token's route and weight.

    A crosscoder reads all blocks: its route is the last, whose output its splice decides.
    """
    if is_crosscoder(sae):
        acts = sae.encode_layers(streams)
        route = torch.full(acts.shape[:-1], streams.shape[-2] - 1, device=acts.device)
        return _Read(acts, route, torch.ones_like(acts[..., 0]))
    assert isinstance(sae, RoutedSAEMixin)
    routing = sae.route(streams)
    acts = in_units(sae.encode(routing.x_route), routing, sae)
    return _Read(acts, routing.route, routing.weight)


class _ActivationByBlock:
    """How strongly features would fire at every block, on the tokens they fire on (Figure 1)."""

    def __init__(self, sae: SAE[Any]) -> None:
        assert isinstance(sae, RoutedSAEMixin)  # with hard routing
        self.sae, self.blocks = sae, routed_blocks(sae)
        self.sums = torch.zeros(sae.cfg.d_sae, len(self.blocks), device=sae.W_dec.device)

    def add(
        self,
        streams: Float[Tensor, "batch pos L d"],
        read: _Read,
        kept: Bool[Tensor, "batch pos"],
    ) -> None:
        kept = kept.to(read.acts.device)
        fired = (read.acts > 0)[kept]
        # at every block with the weight of the one that was chosen, as in `route_errors`
        weight = read.weight[kept].unsqueeze(-1)
        for route, stream in enumerate(streams.unbind(-2)):
            there = self.sae.encode(weight * normalize(stream[kept])) / weight
            self.sums[:, route] += (there * fired).sum(0)

    def means(self, profile: FeatureProfile) -> dict[int, float]:
        """Of one feature, by block."""
        means = self.sums[profile.feature] / profile.n_fired
        return dict(zip(self.blocks, means.tolist(), strict=True))


def _blocks_of_features(
    table: FeatureTable, by_block: _ActivationByBlock
) -> tuple[list[FeatureDepth], list[ShownFeature]]:
    """Depths of the features with enough contexts, and those of the fewest and the most classes.

    Word-level and pattern features are told apart by their contexts, not by their blocks: features
    that fire on few token classes against those that fire on the most.
    """
    profiles = [table.profile(feature) for feature in table.interpretable]
    profiles = [profile for profile in profiles if profile.n_contexts >= _MIN_CONTEXTS]
    profiles.sort(key=lambda profile: (profile.n_classes, -profile.max_activation))
    chosen: dict[Kind, list[FeatureProfile]] = {
        "word": profiles[:_SHOWN],
        "pattern": profiles[::-1][:_SHOWN],
    }
    depths = [
        FeatureDepth(profile.n_classes, profile.mean_block)
        for profile in profiles
        if profile.mean_block is not None
    ]
    shown = []
    for kind, of_kind in chosen.items():
        for profile in of_kind:
            contexts = table.contexts_of(profile.feature)[:_SHOWN_CONTEXTS]
            texts = [context.text for context in contexts]
            shown.append(ShownFeature(kind, profile, by_block.means(profile), texts))
    return depths, shown


def _counts(reproduction: Reproduction, run: Run, collector: ContextCollector) -> FeatureCounts:
    table = collector.table()
    counts = table.run.counts
    thresholds = [count.threshold for count in counts]
    profiles = [table.profile(feature) for feature in table.interpretable]
    scored = {table.run.options.threshold: _mean_surface_score(table)}
    if run.method == ROUTE.label and run.seed == reproduction.seeds[0]:  # Figure 5 b
        others = {count.threshold for count in counts} - set(scored)
        scored |= {at: _mean_surface_score(collector.table(at)) for at in others}
    return FeatureCounts(
        run=run,
        thresholds=thresholds,
        read_at=counted_shares(reproduction.read_share).index(reproduction.read_share),
        n_features=[count.n_features for count in counts],
        surface_scores=[scored.get(count.threshold) for count in counts],
        judge_score=_judge_score(reproduction, run, table),
        more_than_4_contexts=sum(profile.n_contexts > 4 for profile in profiles),
        at_most_32_classes=sum(profile.n_classes <= 32 for profile in profiles),
    )


def _mean_surface_score(table: FeatureTable) -> float | None:
    scores = [score.score for score in surface_ranking(table) if score.score is not None]
    return statistics.fmean(scores) if scores else None


def _judge_score(reproduction: Reproduction, run: Run, table: FeatureTable) -> float | None:
    """Mean score of 100 features, for the first seed of the methods traded over sparsities."""
    methods = [method.label for method in shown_in("sparsity")]
    judged = run.method in methods and run.seed == reproduction.seeds[0]
    if reproduction.judge is None or not judged or not table.interpretable:
        return None
    path = reproduction.output / "judge" / f"{run.name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    judge = Judge(reproduction.judge, base_url=reproduction.base_url)
    return judge.run(table, path).summary.mean_score
