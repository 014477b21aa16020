"""Dictionaries of synthetic streams: trained by SAELens's trainer, or made of the truth itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import SAE, TrainingSAE, TrainingSAEConfig
from sae_lens.synthetic import init_sae_to_match_feature_dict
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from torch import Tensor

from sae_lens_route.errors import UserError
from sae_lens_route.evals.concept_readers import MultiLayerReader, SAEReader
from sae_lens_route.saes.architectures import RouteTopKSAE, RouteTopKSAEConfig
from sae_lens_route.saes.inference import to_inference
from sae_lens_route.saes.multi_layer import MultiLayerTopKTrainingSAE
from sae_lens_route.saes.router import normalize, pick_route, streams_at
from sae_lens_route.synthetic.streams import Sample, SyntheticStreams


@dataclass(frozen=True)
class SyntheticEntry:
    """One dictionary to train.

    Args:
        sae: A RouteSAE, multi-layer SAE or crosscoder for as many blocks as it reads.
        blocks: The blocks that it reads, ascending; None reads all.
        oracle: Whether each token is read at its block with the largest mass of active features.
            The SAE must have routing="uniform" and read all blocks.
        seed: Of the weights.
    """

    sae: TrainingSAEConfig
    blocks: tuple[int, ...] | None = None
    oracle: bool = False
    seed: int = 0


@dataclass(frozen=True)
class SyntheticDictionary:
    """A dictionary with what it reads of a sample.

    Args:
        reader: The SAE for inference; a `MultiLayerReader` reads all blocks one by one.
        blocks: The block of each of its routes.
        oracle: As in `SyntheticEntry`.
    """

    reader: SAEReader
    blocks: tuple[int, ...]
    oracle: bool = False

    @classmethod
    def of(
        cls, sae: SAE[Any], n_blocks: int, *, oracle: bool = False, name: str = ""
    ) -> SyntheticDictionary:
        """One that reads all blocks."""
        blocks = tuple(range(n_blocks))
        _describe(sae, blocks)
        return cls(SAEReader(name, sae), blocks, oracle)


def _describe(sae: Any, blocks: tuple[int, ...]) -> None:
    sae.cfg.metadata.routed_blocks = list(blocks)


def known_dictionary(
    streams: SyntheticStreams, k: int, *, oracle: bool = False, seed: int = 0
) -> SyntheticDictionary:
    """The true directions as encoder and decoder, with TopK: all but a trained encoder.

    Args:
        streams: What it reads; `b_dec` is the mean of n(x) over 4,096 tokens and all blocks.
        k: Active features per token.
        oracle: Whether each token is read at its best block; otherwise at a random one.
        seed: Of the tokens that `b_dec` is computed from.
    """
    n_features, d = streams.directions.shape
    config = RouteTopKSAEConfig(
        d_in=d, d_sae=n_features, k=k, n_routed_layers=streams.cfg.n_blocks, routing="uniform"
    )
    sae = RouteTopKSAE(config)
    init_sae_to_match_feature_dict(sae, streams.features)
    sae.b_dec.data = normalize(next(streams.batches(4096, seed)).streams).mean((0, 1))
    return SyntheticDictionary.of(sae, streams.cfg.n_blocks, oracle=oracle, name="known directions")


def train_dictionaries(
    streams: SyntheticStreams,
    entries: Mapping[str, SyntheticEntry],
    *,
    training_tokens: int,
    batch_size: int = 512,
    lr: float = 1e-3,
    lr_warm_up_steps: int = 0,
    lr_decay_steps: int = 0,
    seed: int = 0,
) -> dict[str, SyntheticDictionary]:
    """Train dictionaries on the same tokens by SAELens's `MultiSAETrainer`, for inference.

    Args:
        streams: Where the tokens come from.
        entries: What to train, by name.
        training_tokens: Tokens that each dictionary sees.
        batch_size: Tokens of a step.
        lr: Learning rate of Adam.
        lr_warm_up_steps: Steps over which it rises from 0.
        lr_decay_steps: Last steps, over which it falls to 0.
        seed: Of the tokens.

    Raises:
        UserError: an entry is not made for the blocks that it reads, or cannot follow an oracle.
    """
    blocks = {name: _blocks(streams, name, entry) for name, entry in entries.items()}
    saes: dict[str, TrainingSAE[Any]] = {}
    for name, entry in entries.items():
        torch.manual_seed(entry.seed)
        saes[name] = TrainingSAE.from_dict(entry.sae.to_dict())
        _describe(saes[name], blocks[name])
    keys = {name: (blocks[name], entry.oracle) for name, entry in entries.items()}

    def batches() -> Iterator[dict[str, Tensor]]:
        for sample in streams.batches(batch_size, seed):
            yield {str(key): _training_input(sample, *key) for key in set(keys.values())}

    cfg = SAETrainerConfig(
        total_training_samples=training_tokens,
        train_batch_size_samples=batch_size,
        lr=lr,
        lr_end=lr,
        lr_warm_up_steps=lr_warm_up_steps,
        lr_decay_steps=lr_decay_steps,
    )
    sources = {name: str(key) for name, key in keys.items()}
    MultiSAETrainer(cfg, saes, sources, batches()).fit()
    trained = {}
    for name, sae in saes.items():
        reader = MultiLayerReader if isinstance(sae, MultiLayerTopKTrainingSAE) else SAEReader
        inference = to_inference(sae)
        trained[name] = SyntheticDictionary(
            reader(name, inference), blocks[name], entries[name].oracle
        )
    return trained


def _blocks(streams: SyntheticStreams, name: str, entry: SyntheticEntry) -> tuple[int, ...]:
    n_blocks, cfg = streams.cfg.n_blocks, entry.sae
    blocks = tuple(range(n_blocks)) if entry.blocks is None else entry.blocks
    if list(blocks) != sorted(set(blocks) & set(range(n_blocks))) or not blocks:
        raise UserError(
            f"entry {name!r}: blocks={entry.blocks} must ascend and be some of 0 to {n_blocks - 1}"
        )
    n_routes = getattr(cfg, "n_routed_layers", None)
    if n_routes != len(blocks):
        raise UserError(
            f"entry {name!r}: n_routed_layers={n_routes}, but it reads {len(blocks)} blocks"
        )
    if entry.oracle and (getattr(cfg, "routing", None) != "uniform" or len(blocks) < n_blocks):
        raise UserError(
            f"entry {name!r}: an oracle chooses among all {n_blocks} blocks in the place of "
            "routing='uniform'"
        )
    return blocks


def _training_input(sample: Sample, blocks: tuple[int, ...], oracle: bool) -> Tensor:
    """The streams `[tokens, L, d]` that an entry reads.

    For an oracle every route has the stream of the best block: whichever is drawn, it is that one.
    """
    x = sample.streams
    if oracle:
        return pick_route(x, sample.best_block).unsqueeze(1).expand_as(x)
    return streams_at(x, blocks)
