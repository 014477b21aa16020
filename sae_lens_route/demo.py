"""The demo: two RouteSAEs of the embedded language model, trained and evaluated without downloads.

The paper's router and the one of the assignment objective see the same activations, so that their
numbers can be compared; the page of features is of the second, whose router spreads the tokens.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from sae_lens_route.config import RouteSAERunnerConfig
from sae_lens_route.dashboards import write_dashboard
from sae_lens_route.evals.evaluate import evaluate_all
from sae_lens_route.evals.reconstruction import ReconstructionMetrics
from sae_lens_route.plots import routing_weights, training_curves, write_figure
from sae_lens_route.records import as_json
from sae_lens_route.saes import RouteTopKTrainingSAEConfig
from sae_lens_route.saes.routed import RoutedSAEMixin
from sae_lens_route.training.checkpoint import require_new_folder
from sae_lens_route.training.entries import expand_runs
from sae_lens_route.training.sweep import SweepRunner
from sae_lens_route.training.trainer import TRAIN_LOG_FILENAME

D_MODEL = 128

_ROUTERS = {"paper": {}, "assignment": {"router_objective": "assignment"}}
"""What the two RouteSAEs differ in, by the name of their folders."""

_LR = 3e-3
"""The best for a run of so few steps (`docs/training.md`)."""


def demo_config(
    output_path: str | Path, *, training_tokens: int, lr: float = 5e-4, seed: int = 42
) -> RouteSAERunnerConfig:
    """The paper's settings at the size of the embedded model.

    Only settings that depend on the size differ: context 256 (the model's maximum), k 16 at d 128,
    and 512 tokens per step instead of 32,768.
    """
    return RouteSAERunnerConfig(
        sae=RouteTopKTrainingSAEConfig(d_in=D_MODEL, d_sae=8 * D_MODEL, k=16),
        model_name="demo",
        dataset_path="demo",
        context_size=256,
        training_tokens=training_tokens,
        store_batch_size_prompts=8,
        train_batch_size_tokens=512,
        lr=lr,
        n_checkpoints=1,
        output_path=str(output_path),
        seed=seed,
    )


def run_demo(
    output: str | Path,
    *,
    training_tokens: int = 500_000,
    eval_tokens: int = 30_000,
    seed: int = 42,
) -> dict[str, Any]:
    """Train, save and evaluate; write both SAEs, `report.json`, two figures and a page of features.

    Args:
        output: A new folder.
        training_tokens: Tokens to train on.
        eval_tokens: Held-out tokens to evaluate on.
        seed: Seed of the SAEs' weights.

    Returns:
        The content of `report.json`.

    Raises:
        UserError: The folder holds a run already.
    """
    output = Path(output)
    require_new_folder(output, also_holds="report.json")
    started = time.perf_counter()
    cfg = demo_config(output, training_tokens=training_tokens, lr=_LR, seed=seed)
    sizes = {"d_sae": cfg.sae.d_sae, "k": cfg.sae.k}
    runs = {name: {**sizes, **settings} for name, settings in _ROUTERS.items()}
    runner = SweepRunner(cfg, expand_runs(runs, D_MODEL, [seed]))
    training_started = time.perf_counter()
    saes = runner.run()
    training_seconds = time.perf_counter() - training_started

    text = "demo:heldout"
    evaluations = evaluate_all(runner.model, saes, text, max_tokens=eval_tokens, unscaled=True)
    rebuilt = {name: each.reconstruction for name, each in evaluations.items()}
    routers = {n: m for n, m in rebuilt.items() if isinstance(m, ReconstructionMetrics)}
    log = defaultdict(list)
    for line in (output / TRAIN_LOG_FILENAME).read_text().splitlines():
        record = json.loads(line)
        log[record["name"]].append(record)
    shown, page = saes["assignment"], output / "dashboard.html"
    assert isinstance(shown, RoutedSAEMixin)
    figures = [
        *write_figure(routing_weights(routers), output / "routing_weights"),
        *write_figure(training_curves(log), output / "training"),
        write_dashboard(runner.model, shown, text, page, max_tokens=eval_tokens),
    ]
    n_tokens = cfg.total_training_steps * cfg.step_tokens
    report = {
        "training_tokens": n_tokens,
        "tokens_per_second": n_tokens / training_seconds,
        "training_seconds": training_seconds,
        "seconds": time.perf_counter() - started,
        "held_out": {name: each.to_dict() for name, each in evaluations.items()},
        "figures": [path.name for path in figures],
    }
    (output / "report.json").write_text(as_json(report))
    return json.loads((output / "report.json").read_text())
