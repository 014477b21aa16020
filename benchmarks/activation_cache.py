"""Training from an activation cache, relative to training with the language model.

    sae-lens-route smollm2 smollm2
    python benchmarks/activation_cache.py --config examples/configs/smollm2-135m.yaml \\
        --training-tokens 32768 --output benchmarks/results/activation_cache.json

Timed in turn in one process (A B C D, A B C D, ...), the first round dropped; each time is divided
by the same round's A, and the result is the median over rounds:

(A) one RouteSAE, trained with the language model;
(B) the same, which writes its cache as it trains;
(C) the same from that cache, without the language model;
(D) the same from a cache in int8.

Each is a whole `run()`; loading the model is not counted. The weights of A, B and C are compared
bit for bit, and the NormMSE of C and D on held-out text.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.sae import TrainingSAE

from sae_lens_route.config import runner_config
from sae_lens_route.config_fields import read_config_file
from sae_lens_route.data.activation_cache import ActivationCache, write_cache
from sae_lens_route.evals.evaluate import evaluate_all
from sae_lens_route.saes.inference import to_inference
from sae_lens_route.training.runner import RouteSAETrainingRunner, load_model_of_run

WITH_MODEL, WRITES, FROM_CACHE, FROM_INT8 = "model", "writes its cache", "cache", "cache, int8"
TARGET = 5.0
"""A run from the cache should be this many times as fast."""


def trained(
    fields: Mapping[str, Any], model: Any, cache: Path | None, dtype: str
) -> tuple[float, TrainingSAE[Any], bool]:
    """Seconds of a run, its SAE, and whether it used the language model."""
    folder = None if cache is None else str(cache)
    cfg = runner_config({**fields, "cache_activations": folder, "cache_dtype": dtype})
    uses_model = cache is None or not ActivationCache(cfg).replaces_the_model()
    runner = RouteSAETrainingRunner(cfg, override_model=model if uses_model else None)
    started = time.perf_counter()
    sae = runner.run()
    return time.perf_counter() - started, sae, uses_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="a run as `train` takes it")
    parser.add_argument("--training-tokens", type=int, default=32_768)
    parser.add_argument("--eval-tokens", type=int, default=8_192)
    parser.add_argument("--held-out", default=None, help="text to evaluate on; default: the run's")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    fields = {**read_config_file(args.config), "training_tokens": args.training_tokens}
    fields |= {"output_path": None, "n_checkpoints": 0}
    cfg = runner_config(fields)
    model = load_model_of_run(cfg)
    seconds: dict[str, list[float]] = {}
    saes: dict[str, TrainingSAE[Any]] = {}
    with tempfile.TemporaryDirectory() as work:
        exact, int8, new = (Path(work) / name for name in ("exact", "int8", "new"))
        n_bytes = {}
        for folder, dtype in ((exact, "exact"), (int8, "int8")):
            settings = {**fields, "cache_activations": str(folder), "cache_dtype": dtype}
            shards = write_cache(runner_config(settings), model)
            n_bytes[dtype] = shards.manifest.row_bytes
        for _ in range(args.rounds + 1):
            for name, cache, dtype in (
                (WITH_MODEL, None, "exact"),
                (WRITES, new, "exact"),
                (FROM_CACHE, exact, "exact"),
                (FROM_INT8, int8, "int8"),
            ):
                spent, saes[name], uses_model = trained(fields, model, cache, dtype)
                assert uses_model == (name in (WITH_MODEL, WRITES))
                seconds.setdefault(name, []).append(spent)
            shutil.rmtree(new)
    same = all(
        torch.equal(weight, saes[name].state_dict()[parameter])
        for name in (WRITES, FROM_CACHE)
        for parameter, weight in saes[WITH_MODEL].state_dict().items()
    )
    text = cfg.dataset_path if args.held_out is None else args.held_out
    evaluated = {name: to_inference(saes[name]) for name in (FROM_CACHE, FROM_INT8)}
    found = evaluate_all(model, evaluated, text, max_tokens=args.eval_tokens, splice=False)
    errors = {name: each.reconstruction.norm_mse for name, each in found.items()}
    rates = {
        name: [b / a for a, b in zip(values[1:], seconds[WITH_MODEL][1:], strict=True)]
        for name, values in seconds.items()
    }
    print(f"{cfg.model_name}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, values in rates.items():
        tokens = args.training_tokens / statistics.median(seconds[name][1:])
        print(f"{name:18} {statistics.median(values):5.2f} x the rate, {tokens:8,.0f} tokens/s")
    print(f"aim {TARGET:g} x; same bits: {same}; bytes a token: {n_bytes}; NormMSE {errors}")
    result = {
        "rates": rates,
        "seconds": seconds,
        "target": TARGET,
        "same_bits": same,
        "bytes_per_token": n_bytes,
        "norm_mse": errors,
        "config": fields,
        "threads": torch.get_num_threads(),
        "platform": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("torch", "sae-lens", "transformers")},
    }
    args.output.write_text(json.dumps(result, indent=1, default=str) + "\n")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
