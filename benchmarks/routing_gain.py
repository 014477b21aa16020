"""Routing gain of the routers with a million training tokens, on the demo model.

    python benchmarks/routing_gain.py --output benchmarks/results/routing_gain.json

The comparison of `docs/reproduction.md` at the length of `sae-lens-route demo`: the paper's router,
a frozen one, the assignment router and a uniform one on one stream, then for each router a random
one with its shares. Dictionaries have d_sae 1,024 and k 16; all are evaluated on the same held-out
tokens. `b_dec` starts at 0, as in the paper's code, and p scales x_route under every objective.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from sae_lens_route import SweepEntry, SweepRunner, load_model
from sae_lens_route.demo import demo_config
from sae_lens_route.evals.comparison import evaluate_sweep
from sae_lens_route.paper.methods import shown_in
from sae_lens_route.paper.plan import Run, sweep_entries
from sae_lens_route.paper.report import routers_table
from sae_lens_route.paper.reproduction import share_matched
from sae_lens_route.paper.results import Trained
from sae_lens_route.records import plain

K = 16


def compare(training_tokens: int, eval_tokens: int, seeds: int) -> list[Trained]:
    """Train and evaluate the routers, then their random twins."""
    model = load_model("demo")
    with tempfile.TemporaryDirectory() as folder:
        cfg = demo_config(folder, training_tokens=training_tokens)
    cfg = replace(cfg, output_path=None, n_checkpoints=0)
    cfg.resolve(model)

    def trained(entries: Mapping[Run, SweepEntry]) -> list[Trained]:
        by_name = {run.name: entry for run, entry in entries.items()}
        saes = SweepRunner(cfg, by_name, override_model=model).run()
        result = evaluate_sweep(model, by_name, saes, "demo:heldout", max_tokens=eval_tokens)
        return [Trained(run, row) for run, row in zip(entries, result.rows, strict=True)]

    runs = [Run(method.label, K, seed) for method in shown_in("routers") for seed in range(seeds)]
    as_recorded = {"b_dec_init": "zeros", "scale_by_probability": True}
    entries = {
        run: replace(entry, sae=replace(entry.sae, **as_recorded))
        for run, entry in sweep_entries(runs, cfg, {}, {}).items()
    }
    routers = trained(entries)
    return routers + trained(share_matched(entries, routers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--training-tokens", type=int, default=1_000_000)
    parser.add_argument("--eval-tokens", type=int, default=30_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    trained = compare(args.training_tokens, args.eval_tokens, args.seeds)
    content = {
        "training_tokens": args.training_tokens,
        "eval_tokens": args.eval_tokens,
        "k": K,
        "versions": {"torch": torch.__version__, "sae-lens": version("sae-lens")},
        "trained": plain(trained),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(content, indent=1) + "\n")
    print(routers_table(trained))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
