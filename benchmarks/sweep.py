"""Cost of six dictionaries on one stream of activations, relative to one, and to six runs.

    python benchmarks/sweep.py --work FOLDER --output benchmarks/results/sweep.json
    python benchmarks/sweep.py --model-class AutoModelForCausalLM --work FOLDER \\
        --output benchmarks/results/sweep_hugging_face.json      # the same; --dense: once more

Timed in turn in one process (A B C, A B C, ...), the first round dropped; each time is divided by
the same round's A, and the result is the median over rounds:

(A) one RouteSAE, trained by `RouteSAETrainingRunner`;
(B) RouteSAEs with six values of k, trained by `SweepRunner` on one stream;
(C) the same six, one run after the other.

Each is a whole `run()` of a few steps: language model, routing, update, log; nothing is saved. The
language model has random weights, and runs once per step in A and B, six times in C.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from random_llama import random_llama

from sae_lens_route import (
    RouteSAERunnerConfig,
    RouteSAETrainingRunner,
    RouteTopKTrainingSAEConfig,
    SweepEntry,
    SweepRunner,
    load_model,
)

SHAPES = {
    "tiny": {"d": 32, "heads": 2, "vocab": 64, "d_sae": 64, "prompts": 2, "context": 16},
    "cpu": {"d": 256, "heads": 4, "vocab": 8192, "d_sae": 2048, "prompts": 8, "context": 256},
    "gpu": {
        "d": 2048, "heads": 32, "vocab": 128256, "d_sae": 16384, "prompts": 64, "context": 512,
    },
}  # fmt: skip
KS = (8, 16, 24, 32, 48, 64)
ALONE = 32
TARGET = 2.0
"""Six dictionaries on one stream should cost at most this many times one."""


def variants(
    shape: dict[str, int], folder: Path, n_steps: int, device: str, kind: str, dense: bool = False
) -> dict[str, Callable[[], list[Any]]]:
    """The three things to time; each call makes new runners, whose `run` is timed."""
    # the slower the model, the more a sweep gains: SAELens's proxy has the fastest attention
    model: Any = load_model(str(random_llama(shape, folder)), kind, device=device)
    step = shape["prompts"] * shape["context"]
    rows = torch.randint(2, shape["vocab"], (shape["prompts"] * n_steps, shape["context"]))
    data = Dataset.from_dict({"tokens": rows.tolist()})

    def sae(k: int) -> RouteTopKTrainingSAEConfig:
        return RouteTopKTrainingSAEConfig(
            d_in=shape["d"],
            d_sae=shape["d_sae"],
            k=k,
            device=device,
            use_sparse_activations=False if dense else None,
        )

    def config(k: int) -> RouteSAERunnerConfig:
        return RouteSAERunnerConfig(
            sae=sae(k),
            model_name=str(folder),
            model_class_name=kind,
            dataset_path="",
            context_size=shape["context"],
            store_batch_size_prompts=shape["prompts"],
            training_tokens=n_steps * step,
            exclude_special_tokens=False,
            n_checkpoints=0,
            device=device,
            output_path=None,
        )

    def alone(k: int) -> RouteSAETrainingRunner:
        return RouteSAETrainingRunner(config(k), override_dataset=data, override_model=model)

    def together() -> SweepRunner:
        entries = {f"k={k}": SweepEntry(sae(k)) for k in KS}
        return SweepRunner(config(ALONE), entries, override_dataset=data, override_model=model)

    return {
        "one": lambda: [alone(ALONE)],
        "six on one stream": lambda: [together()],
        "six runs": lambda: [alone(k) for k in KS],
    }


def seconds_of(make: Callable[[], list[Any]], device: str) -> float:
    runners = make()
    started = time.perf_counter()
    for runner in runners:
        runner.run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="cpu")
    parser.add_argument("--steps", type=int, default=5, help="steps of a run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model-class", default="HookedTransformer", help="kind of language model")
    parser.add_argument("--dense", action="store_true", help="use_sparse_activations=False")
    parser.add_argument("--work", type=Path, required=True, help="folder for the random model")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    timed = variants(
        SHAPES[args.shape], args.work, args.steps, args.device, args.model_class, args.dense
    )
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(args.rounds + 1):
        for name, make in timed.items():
            seconds[name].append(seconds_of(make, args.device))
    ratios = {
        name: [a / b for a, b in zip(values[1:], seconds["one"][1:], strict=True)]
        for name, values in seconds.items()
    }
    threads = torch.get_num_threads()
    print(f"{args.shape}, {threads} threads, float32, torch {torch.__version__}")
    print(f"{'':20}{'x one':>8}{'least':>8}{'most':>8}")
    for name, values in ratios.items():
        median = statistics.median(values)
        print(f"{name:20}{median:8.2f}{min(values):8.2f}{max(values):8.2f}")
    print(f"target: six on one stream at most {TARGET} x one")
    content = {
        "shape": SHAPES[args.shape],
        "ks": KS,
        "steps": args.steps,
        "rounds": args.rounds,
        "threads": threads,
        "dtype": "float32",
        "device": args.device,
        "model_class": args.model_class,
        "use_sparse_activations": not args.dense,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: version(name) for name in ("sae-lens", "transformers")},
        },
        "target": TARGET,
        "ratio_to_one": {name: statistics.median(values) for name, values in ratios.items()},
        "ratio_to_one_by_round": ratios,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
