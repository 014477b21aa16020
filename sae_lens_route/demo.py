"""The demo: a RouteSAE of the embedded language model, trained and evaluated without downloads."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from sae_lens import SAE

from sae_lens_route.config import RouteSAERunnerConfig
from sae_lens_route.dashboards import write_dashboard
from sae_lens_route.data.reading import activation_batches, kept_activations
from sae_lens_route.evals.evaluate import evaluate
from sae_lens_route.evals.reconstruction import ReconstructionMetrics, reconstruction_metrics
from sae_lens_route.plots import routing_weights, training_curve, write_figure
from sae_lens_route.saes import RouteTopKTrainingSAEConfig
from sae_lens_route.saes.routed import RoutedSAEMixin
from sae_lens_route.training.checkpoint import require_new_folder
from sae_lens_route.training.runner import RouteSAETrainingRunner
from sae_lens_route.training.trainer import TRAIN_LOG_FILENAME

D_MODEL = 128


def demo_config(
    output_path: str | Path, *, training_tokens: int = 1_000_000, k: int = 16, seed: int = 42
) -> RouteSAERunnerConfig:
    """The demo's run: the paper's settings at the size of the embedded model.

    Only settings that depend on the size differ: context 256 (the model's maximum), k 16 at d 128,
    and 512 tokens per step instead of 32,768, so that a million tokens are 1,953 steps.
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
    """Train, save, load and evaluate; write `sae/`, `report.json`, two figures and a dashboard.

    Args:
        output: A new folder.
        training_tokens: Tokens to train on.
        eval_tokens: Tokens of training and of held-out text to evaluate on, each.
        seed: Seed of the SAE's weights.

    Returns:
        The content of `report.json`.

    Raises:
        UserError: The folder holds a run already.
    """
    output = Path(output)
    require_new_folder(output, also_holds="report.json")
    started = time.perf_counter()
    cfg = demo_config(output / "sae", training_tokens=training_tokens, seed=seed)
    runner = RouteSAETrainingRunner(cfg)
    training_started = time.perf_counter()
    runner.run()
    training_seconds = time.perf_counter() - training_started

    sae = SAE.load_from_disk(output / "sae")
    assert isinstance(sae, RoutedSAEMixin)
    model = runner.model
    train_text = activation_batches(
        model, sae, "demo:train", max_tokens=eval_tokens, description="evaluating on training text"
    )
    train = reconstruction_metrics(sae, kept_activations(train_text, sae))
    evaluation = evaluate(model, sae, "demo:heldout", max_tokens=eval_tokens)
    held_out = evaluation.reconstruction
    assert isinstance(held_out, ReconstructionMetrics)
    log = (output / "sae" / TRAIN_LOG_FILENAME).read_text().splitlines()
    routing = routing_weights({"train": train, "held-out": held_out})
    figures = [
        *write_figure(routing, output / "routing_weights"),
        *write_figure(training_curve([json.loads(line) for line in log]), output / "training"),
        write_dashboard(
            model, sae, "demo:heldout", output / "dashboard.html", max_tokens=eval_tokens
        ),
    ]
    n_tokens = cfg.total_training_steps * cfg.step_tokens
    report = {
        "norm_mse": held_out.norm_mse,
        "l0": held_out.l0,
        "share_per_block": held_out.share_by_block,
        "dead_features": held_out.dead_features,
        "training_tokens": n_tokens,
        "tokens_per_second": n_tokens / training_seconds,
        "training_seconds": training_seconds,
        "seconds": time.perf_counter() - started,
        "train": train._asdict(),
        "held_out": evaluation.to_dict(),
        "figures": [path.name for path in figures],
    }
    text = json.dumps(report, indent=1)
    (output / "report.json").write_text(text + "\n")
    return json.loads(text)
