"""What routers are worth, with a million training tokens, on the demo model.

    python benchmarks/routing_gain.py --output benchmarks/results/routing_gain.json

The comparison of `docs/reproduction.md` at the length of `sae-lens-route demo`: the paper's router,
a frozen one, the assignment router and a uniform one on one stream, then for each router a random
one with its shares. Dictionaries have d_sae 1,024 and k 16; all are evaluated on the same held-out
tokens.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sae_lens_route.demo import demo_config
from sae_lens_route.models import load_model
from sae_lens_route.report import ASSIGNMENT, FROZEN, RANDOM, ROUTE, routers_table
from sae_lens_route.reproduction import main_runs, share_matched
from sae_lens_route.sweep import SweepEntry, SweepRunner, evaluate_sweep, expand_runs

K = 16


def compare(training_tokens: int, eval_tokens: int, seeds: int) -> dict[str, Any]:
    """Train and evaluate the routers, then their random twins."""
    model = load_model("demo")
    with tempfile.TemporaryDirectory() as folder:
        cfg = demo_config(folder, training_tokens=training_tokens)
    cfg = replace(cfg, output_path=None, n_checkpoints=0)
    methods = main_runs(K, cfg.sae.d_in, 11, cfg.total_training_steps)
    runs = {
        label: {"d_sae": cfg.sae.d_sae, **methods[label]}
        for label in (ROUTE, FROZEN, ASSIGNMENT, RANDOM)
    }
    entries = {
        f"{entry.label} seed={entry.seed}": entry
        for entry in expand_runs(runs, cfg.sae.d_in, range(seeds)).values()
    }

    def rows(entries: dict[str, SweepEntry]) -> list[dict[str, Any]]:
        saes = SweepRunner(cfg, entries, override_model=model).run()
        return evaluate_sweep(model, entries, saes, "demo:heldout", max_tokens=eval_tokens).rows

    trained = rows(entries)
    return {"methods": trained, "share_matched": rows(share_matched(entries, trained))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--training-tokens", type=int, default=1_000_000)
    parser.add_argument("--eval-tokens", type=int, default=30_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    content = {
        "training_tokens": args.training_tokens,
        "eval_tokens": args.eval_tokens,
        "k": K,
        "versions": {"torch": torch.__version__, "sae-lens": version("sae-lens")},
        **compare(args.training_tokens, args.eval_tokens, args.seeds),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(content, indent=1) + "\n")
    print(routers_table(content))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
