"""Routers and dictionaries on streams whose features are known, and appear and vanish with depth.

    python benchmarks/synthetic_layers.py --output benchmarks/results/synthetic_layers.json

Every seed is another set of features (512 directions in 128 dimensions, 8 blocks, 15.6 active
features at a token, of which 8.8 are present at a block) with its own weights and tokens. All
dictionaries of a seed see the same tokens. k is the mean number of active features of what a
dictionary reads, and one for each dense direction.

`--page FILE` rewrites the tables `known-features` and `known-features-routers` in a Markdown file,
`--figure PATH` draws the recovery by depth class, and `--from-json` takes the runs from a file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.sae import TrainingSAEConfig
from sae_lens.synthetic import LowRankCorrelationConfig

from sae_lens_route.evals.concept_baselines import random_dictionary
from sae_lens_route.paper.markdown import fill_tables, markdown
from sae_lens_route.paper.statistics import interval, over_seeds
from sae_lens_route.plots import Span, recovery_by_depth, write_figure
from sae_lens_route.records import plain, typed
from sae_lens_route.saes import RouteTopKTrainingSAEConfig
from sae_lens_route.saes.crosscoder import TopKTrainingCrosscoderConfig
from sae_lens_route.saes.multi_layer import MultiLayerTopKTrainingConfig
from sae_lens_route.synthetic.dictionaries import (
    SyntheticDictionary,
    SyntheticEntry,
    known_dictionary,
    train_dictionaries,
)
from sae_lens_route.synthetic.score import SyntheticScores, score_dictionary
from sae_lens_route.synthetic.streams import DEPTHS, SyntheticStreams, SyntheticStreamsConfig

BATCH = 256
TRAINING, HELD_OUT = 1_000, 2_000
"""Added to the seed, for tokens that no other seed draws."""

Scores = dict[str, list[SyntheticScores]]
"""By dictionary, one for each seed."""


def known_streams(seed: int) -> SyntheticStreams:
    """The streams of a seed: the default, with correlated features."""
    cfg = SyntheticStreamsConfig(seed=seed)
    correlation = LowRankCorrelationConfig(rank=16, correlation_scale=0.1)
    return SyntheticStreams(replace(cfg, features=replace(cfg.features, correlation=correlation)))


def active(streams: SyntheticStreams) -> tuple[list[int], int]:
    """Active features at each block and at any, with the dense directions."""
    firing = next(streams.batches(8192, seed=streams.cfg.seed)).firing
    anywhere = float((firing > 0).sum(-1).float().mean())
    n_dense = streams.cfg.n_dense
    by_block = [round(l0) + n_dense for l0 in streams.true_l0(firing).tolist()]
    return by_block, round(anywhere) + n_dense


def entries_of(streams: SyntheticStreams) -> dict[str, SyntheticEntry]:
    """What is trained, by name, each with the number of active features of what it reads."""
    (n_features, d), n_blocks = streams.directions.shape, streams.cfg.n_blocks
    by_block, anywhere = active(streams)
    k = round(sum(by_block) / n_blocks)
    seed = streams.cfg.seed

    def entry(sae: TrainingSAEConfig, **fields: Any) -> SyntheticEntry:
        return SyntheticEntry(sae, seed=seed, **fields)

    def routed(k: int = k, n_routes: int = n_blocks, **fields: Any) -> TrainingSAEConfig:
        return RouteTopKTrainingSAEConfig(
            d_in=d, d_sae=n_features, k=k, n_routed_layers=n_routes, routing_seed=seed, **fields
        )

    all_blocks = {"d_sae": n_features, "n_routed_layers": n_blocks}
    entries = {
        "RouteSAE": entry(routed()),
        "RouteSAE, frozen router": entry(routed(router_objective="frozen")),
        "RouteSAE, assignment": entry(routed(router_objective="assignment")),
        "uniform router": entry(routed(routing="uniform")),
        "oracle router": entry(routed(routing="uniform"), oracle=True),
        "MLSAE": entry(MultiLayerTopKTrainingConfig(d_in=d, k=k, **all_blocks)),
        "Crosscoder, TopK": entry(
            TopKTrainingCrosscoderConfig(d_in=n_blocks * d, k=anywhere, **all_blocks)
        ),
    }
    for block in (0, n_blocks // 2, n_blocks - 1):
        sae = routed(by_block[block], 1)
        entries[f"TopK, block {block}"] = entry(sae, blocks=(block,))
    return entries


def untrained(streams: SyntheticStreams, k: int) -> dict[str, SyntheticDictionary]:
    """The true directions, and random ones."""
    n_blocks, seed = streams.cfg.n_blocks, streams.cfg.seed
    known = known_dictionary(streams, k, seed=seed)
    random = random_dictionary(known.reader.sae, seed=seed)
    return {
        "true directions, uniform router": known,
        "true directions, oracle router": known_dictionary(streams, k, oracle=True, seed=seed),
        "random directions": SyntheticDictionary.of(random, n_blocks),
    }


def run(seed: int, training_tokens: int, eval_tokens: int, lr: float) -> dict[str, SyntheticScores]:
    """Train and score everything with one seed."""
    streams = known_streams(seed)
    entries = entries_of(streams)
    trained = train_dictionaries(
        streams,
        entries,
        training_tokens=training_tokens,
        batch_size=BATCH,
        lr=lr,
        lr_decay_steps=training_tokens // BATCH // 5,
        seed=TRAINING + seed,
    )
    dictionaries = trained | untrained(streams, entries["RouteSAE"].sae.k)
    samples = list(islice(streams.batches(2048, HELD_OUT + seed), max(1, eval_tokens // 2048)))
    return {name: score_dictionary(streams, d, samples) for name, d in dictionaries.items()}


def recovery_table(scores: Scores) -> str:
    """Reconstruction, F1 and the share of recovered features by depth class."""
    columns: dict[str, tuple[Callable[[SyntheticScores], float | None], str]] = {
        "NormMSE": (lambda s: s.norm_mse, ".3f"),
        "MCC": (lambda s: s.overall.mean_cosine, ".2f"),
        "F1 where read": (lambda s: s.overall.f1_read, ".2f"),
        "F1 anywhere": (lambda s: s.overall.f1_anywhere, ".2f"),
        "recovered": (lambda s: s.overall.recovered, ".2f"),
        **{d: (lambda s, d=d: s.by_depth[d].recovered, ".2f") for d in DEPTHS},
        "unique": (lambda s: s.uniqueness, ".2f"),
        "dead": (lambda s: s.dead_latents, ".0f"),
    }
    rows = [
        [name, *(over_seeds(map(value, runs), form) for value, form in columns.values())]
        for name, runs in scores.items()
    ]
    return markdown(["dictionary", *columns], rows)


def routers_table(scores: Scores) -> str:
    """What the routers choose, against chance, a random router with their shares, and the best."""
    columns: dict[str, tuple[Callable[[Any], float | None], str]] = {
        "largest share": (lambda r: max(r.share_by_block.values()), ".2f"),
        "at the block of largest mass": (lambda r: r.best_block.routed, ".2f"),
        "share-matched": (lambda r: r.best_block.matched, ".2f"),
        "mass": (lambda r: r.mass.routed, ".3f"),
        "mass, share-matched": (lambda r: r.mass.matched, ".3f"),
        "NormMSE": (lambda r: r.norm_mse.routed, ".3f"),
        "NormMSE, share-matched": (lambda r: r.norm_mse.matched, ".3f"),
        "NormMSE, least": (lambda r: r.norm_mse.oracle, ".3f"),
    }
    rows = []
    for name, runs in scores.items():
        if all(each.router is not None for each in runs):
            cells = (
                over_seeds((value(each.router) for each in runs), form)
                for value, form in columns.values()
            )
            rows.append([name, *cells])
    return markdown(["router", *columns], rows)


def figure_spans(scores: Scores, names: Iterable[str]) -> dict[str, dict[str, Span]]:
    def span(runs: Sequence[SyntheticScores], depth: str) -> Span:
        return interval([each.by_depth[depth].recovered for each in runs]).span

    return {name: {depth: span(scores[name], depth) for depth in DEPTHS} for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--training-tokens", type=int, default=307_200)
    parser.add_argument("--eval-tokens", type=int, default=16_384)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--from-json", action="store_true", help="read --output, train nothing")
    parser.add_argument("--page", type=Path)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    if args.from_json:
        scores = typed(Scores, json.loads(args.output.read_text())["dictionaries"])
    else:
        scores = {}
        for seed in range(args.seeds):
            result = run(seed, args.training_tokens, args.eval_tokens, args.lr)
            for name, each in result.items():
                scores.setdefault(name, []).append(each)
        content = {
            "training_tokens": args.training_tokens,
            "lr": args.lr,
            "streams": plain(known_streams(0).cfg),
            "versions": {"torch": torch.__version__, "sae-lens": version("sae-lens")},
            "dictionaries": plain(scores),
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(content, indent=1) + "\n")
        print(f"wrote {args.output}")
    tables = {"known-features": recovery_table(scores)}
    tables["known-features-routers"] = routers_table(scores)
    print("\n\n".join(tables.values()))
    if args.page is not None:
        fill_tables(args.page, tables)
    if args.figure is not None:
        trained = [name for name in scores if "directions" not in name and "frozen" not in name]
        write_figure(recovery_by_depth(figure_spans(scores, trained)), args.figure)


if __name__ == "__main__":
    main()
