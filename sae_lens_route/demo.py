"""The demo: a RouteSAE of the embedded language model, trained and evaluated with no download."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, cast

from sae_lens import SAE

from sae_lens_route.activations import RoutedActivationsStore
from sae_lens_route.dashboards import write_dashboard
from sae_lens_route.evals import ReconstructionMetrics, evaluate, reconstruction_metrics
from sae_lens_route.plots import routing_weights, training_curve, write_figure
from sae_lens_route.runner import (
    TRAIN_LOG_FILENAME,
    RouteSAERunnerConfig,
    RouteSAETrainingRunner,
    require_new_folder,
)
from sae_lens_route.saes import RoutedSAE, RouteTopKTrainingSAEConfig

D_MODEL = 128


def demo_config(
    output_path: str | Path, *, training_tokens: int = 1_000_000, k: int = 16, seed: int = 42
) -> RouteSAERunnerConfig:
    """The demo's run: the paper's settings at the size of the embedded model.

    Only what its size asks for differs: context 256 (all it has), k 16 of d 128, and 512 tokens a
    step instead of 32,768, so that a million tokens are 1,953 steps.
    """
    return RouteSAERunnerConfig(
        sae=RouteTopKTrainingSAEConfig(d_in=D_MODEL, d_sae=8 * D_MODEL, k=k),
        model_name="demo",
        dataset_path="demo",
        context_size=256,
        training_tokens=training_tokens,
        store_batch_size_prompts=8,
        train_batch_size_tokens=512,
        n_checkpoints=1,
        output_path=str(output_path),
        seed=seed,
    )


def run_demo(
    output: str | Path,
    *,
    training_tokens: int = 1_000_000,
    eval_tokens: int = 50_000,
    seed: int = 42,
) -> dict[str, Any]:
    """Train, save, load, evaluate; writes `sae/`, `report.json`, two figures and a dashboard.

    Args:
        output: A new folder.
        training_tokens: Tokens to train on.
        eval_tokens: Tokens of training and of held-out text to evaluate on, each.
        seed: Seed of the SAE's weights.

    Returns:
        What is in `report.json`.
    """
    output = Path(output)
    require_new_folder(output, also_holds="report.json")
    started = time.perf_counter()
    cfg = demo_config(output / "sae", training_tokens=training_tokens, seed=seed)
    runner = RouteSAETrainingRunner(cfg)
    training_started = time.perf_counter()
    runner.run()
    training_seconds = time.perf_counter() - training_started

    sae = cast(RoutedSAE, SAE.load_from_disk(output / "sae"))
    text = RoutedActivationsStore.from_sae(runner.model, sae, "demo:train")
    evaluation = evaluate(runner.model, sae, "demo:heldout", max_tokens=eval_tokens)
    metrics: dict[str, ReconstructionMetrics] = {
        "train": reconstruction_metrics(sae, text.activation_batches(eval_tokens)),
        "held-out": cast(ReconstructionMetrics, evaluation.reconstruction),
    }

    n_tokens = cfg.total_training_steps * cfg.step_tokens
    blocks = list(cfg.routed_layers or ())
    log = (output / "sae" / TRAIN_LOG_FILENAME).read_text().splitlines()
    figures = [
        *write_figure(routing_weights(metrics, blocks), output / "routing_weights"),
        *write_figure(training_curve([json.loads(line) for line in log]), output / "training"),
    ]
    text = RoutedActivationsStore.from_sae(runner.model, sae, "demo:heldout")
    pages = output / "dashboard.html"
    write_dashboard(runner.model, sae, text, pages, n_features=32, max_tokens=eval_tokens)
    heldout = metrics["held-out"]
    report = {
        "norm_mse": heldout.norm_mse,
        "l0": heldout.l0,
        "share_per_block": dict(zip(map(str, blocks), heldout.share, strict=True)),
        "dead_features": heldout.dead_features,
        "training_tokens": n_tokens,
        "tokens_per_second": n_tokens / training_seconds,
        "training_seconds": training_seconds,
        "seconds": time.perf_counter() - started,
        "train": metrics["train"]._asdict(),
        "held_out": evaluation.to_dict(),
        "figures": [path.name for path in [*figures, pages]],
    }
    (output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    return report
