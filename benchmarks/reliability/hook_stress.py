"""The routed hook under stress: every result is right or refused, never silently wrong.

Five families of trials, each drawn at random, on every kind of model:

    early     a pass ends early (an exception in a block, in the hook function or in the replay,
              `stop_at_layer`, a KeyboardInterrupt at any instant); then comes an ordinary pass of
              another shape, a pass or single blocks that start in the middle, or the rest of a
              cached generation
    order     blocks repeated, skipped, called by hand, and calls of the model inside a hook
    shared    several threads run plain passes, cached passes and passes that fail, with one hook
              function or SAE for all of them: none may be refused
    turns     several threads read, edit at several places and in several ways, and splice an SAE
              in, one at a time: none may be refused
    threads   the same at any time, and threads that attach and remove: right or refused by a
              `UserError`, and the model is as it was afterwards

    python benchmarks/reliability/hook_stress.py --n 2000
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from hook_passes import early, order
from hook_scene import KINDS, Scene, Verdicts
from hook_threads import shared, threads, turns

RESULTS = Path(__file__).parents[1] / "results" / "reliability" / "hook_stress.json"
FAMILIES = {"early": early, "order": order, "shared": shared, "turns": turns, "threads": threads}
VERDICTS = ("ended early", "right", "refused", "WRONG")


@torch.no_grad()
def stress(n: int, seed: int = 0) -> Verdicts:
    """n trials of each family, spread over the kinds of model."""
    counts, rng = Verdicts(), random.Random(seed)
    for kind in KINDS:
        scene = Scene(kind)
        for family, trial in FAMILIES.items():
            for _ in range(-(-n // len(KINDS))):
                trial(scene, rng, counts)
                counts[f"{family}/{kind} trials"] += 1
    return counts


def summary(counts: Verdicts) -> dict[str, dict[str, int]]:
    """By family: trials, and results with each verdict."""
    rows: dict[str, dict[str, int]] = {}
    for name, count in counts.items():
        row = rows.setdefault(name.split("/")[0], dict.fromkeys(("trials", *VERDICTS), 0))
        what = "trials" if name.endswith(" trials") else None
        for verdict in VERDICTS:
            if f": {verdict}" in name or (verdict == "ended early" and "ended" in name):
                what = verdict
        if what:
            row[what] += count
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The routed hook under stress.")
    parser.add_argument("--n", type=int, default=2000, help="trials of each family")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    before = time.perf_counter()
    counts = stress(options.n, options.seed)
    rows = summary(counts)
    print(f"{'family':10}" + "".join(f"{name:>13}" for name in ("trials", *VERDICTS)))
    for family, row in rows.items():
        print(f"{family:10}" + "".join(f"{number:13}" for number in row.values()))
    for name in sorted(counts):
        print(f"{counts[name]:7} {name}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    command = "python benchmarks/reliability/hook_stress.py"
    content = {
        "command": f"{command} --n {options.n} --seed {options.seed}",
        "versions": {name: version(name) for name in ("torch", "sae-lens", "transformer-lens")},
        "seed": options.seed,
        "seconds": round(time.perf_counter() - before),
        "families": rows,
        "counts": dict(sorted(counts.items())),
    }
    options.output.write_text(json.dumps(content, indent=1) + "\n")
    return int(any(row["WRONG"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
