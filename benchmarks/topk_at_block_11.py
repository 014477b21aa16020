"""RouteSAE against a TopK SAE of the same size at block 11, on the demo model (paper, Figure 4).

    python benchmarks/topk_at_block_11.py --output benchmarks/results/topk_at_block_11.json

All see the same tokens in the same order, with the same k, d_sae, learning rate and schedule, and
are spliced in at the same held-out tokens.

- route:           the RouteSAE of the demo, with `b_dec` from 0 as in the paper's code;
- topk_layer_norm: SAELens's TopK SAE from SAELens's runner with `layer_norm`. Its loss is taken
                   in the model's units, so the few tokens of large norm have most weight;
- topk_normalized: SAELens's TopK SAE from SAELens's trainer, on n(x) of block 11 as the paper's
                   baseline sees it, so that every token has the same weight.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sae_lens import (
    SAE,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.training.sae_trainer import SAETrainer

from sae_lens_route import RouteSAETrainingRunner, activation_batches, evaluate, load_model
from sae_lens_route.data.activations import RoutedActivationsStore
from sae_lens_route.data.reading import ActivationBatch
from sae_lens_route.data.text import load_text_dataset
from sae_lens_route.demo import demo_config
from sae_lens_route.evals.reconstruction import ReconstructionMetrics
from sae_lens_route.saes.loss import norm_mse
from sae_lens_route.saes.router import normalization_stats, normalize

HOOK = "blocks.11.hook_resid_post"


def train_topk(model: Any, route_cfg: Any, folder: Path) -> SAE[Any]:
    """SAELens's TopK SAE on the tokens that the RouteSAE saw."""
    cfg = LanguageModelSAERunnerConfig(
        sae=TopKTrainingSAEConfig(
            d_in=route_cfg.sae.d_in,
            d_sae=route_cfg.sae.d_sae,
            k=route_cfg.sae.k,
            normalize_activations="layer_norm",
        ),
        model_name=route_cfg.model_name,
        hook_name=HOOK,
        context_size=route_cfg.context_size,
        training_tokens=route_cfg.training_tokens,
        train_batch_size_tokens=route_cfg.train_batch_size_tokens,
        store_batch_size_prompts=route_cfg.store_batch_size_prompts,
        n_batches_in_buffer=route_cfg.store_batch_size_prompts,
        activations_mixing_fraction=0.0,
        exclude_special_tokens=True,
        lr=route_cfg.lr,
        lr_warm_up_steps=route_cfg.lr_warm_up_steps,
        lr_decay_steps=route_cfg.lr_decay_steps,
        dead_feature_window=10**9,  # its auxiliary loss refuses normalized activations
        seed=route_cfg.seed,
        output_path=str(folder),
        checkpoint_path=None,
        verbose=False,
        logger=LoggingConfig(log_to_wandb=False),
    )
    torch.manual_seed(cfg.seed)
    dataset = load_text_dataset("demo")
    LanguageModelSAETrainingRunner(cfg, override_dataset=dataset, override_model=model).run()
    return SAE.load_from_disk(folder)


def train_topk_normalized(model: Any, route_cfg: Any) -> TopKTrainingSAE:
    """SAELens's TopK SAE on n(x) of the last routed block, by SAELens's trainer."""
    torch.manual_seed(route_cfg.seed)
    store = RoutedActivationsStore.from_config(model, route_cfg)
    config = TopKTrainingSAEConfig(route_cfg.sae.d_in, route_cfg.sae.d_sae, k=route_cfg.sae.k)
    batches = (normalize(batch[:, -1]) for batch in store)
    trainer = SAETrainer(
        replace(route_cfg.to_sae_trainer_config(), checkpoint_path=None, n_checkpoints=0),
        TopKTrainingSAE(config),
        batches,
    )
    return trainer.fit()


@torch.no_grad()
def normalized_reconstruction(sae: Any, x: torch.Tensor) -> torch.Tensor:
    """The reconstruction of x by an SAE of n(x)."""
    mean, scale = normalization_stats(x)
    return sae(normalize(x)) * scale.unsqueeze(-1) + mean.unsqueeze(-1)


@torch.no_grad()
def evaluate_topk(
    model: Any,
    reconstruct_stream: Callable[[torch.Tensor], torch.Tensor],
    batches: Iterable[ActivationBatch],
) -> dict[str, float]:
    """NormMSE in normalized units and KL in nats per token, at kept tokens."""
    kl, error, n = 0.0, 0.0, 0
    for batch in batches:
        tokens, kept = batch.tokens, batch.kept

        def reconstruct(x: torch.Tensor, hook: Any, kept: torch.Tensor = kept) -> torch.Tensor:
            nonlocal error
            x_hat = reconstruct_stream(x)
            # in the units of the RouteSAE's error: x's mean and scale
            mean, scale = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
            error += float(norm_mse((x_hat - mean) / scale, normalize(x))[kept].sum())
            return torch.where(kept.unsqueeze(-1), x_hat, x)

        clean = model(tokens).log_softmax(-1)
        spliced = model.run_with_hooks(tokens, fwd_hooks=[(HOOK, reconstruct)]).log_softmax(-1)
        kl += float((clean.exp() * (clean - spliced)).sum(-1)[kept].sum())
        n += int(kept.sum())
    return {"norm_mse": error / n, "kl": kl / n}


def compare(seed: int, training_tokens: int, eval_tokens: int) -> dict[str, Any]:
    """Train and evaluate both with one seed."""
    model = load_model("demo")
    with tempfile.TemporaryDirectory() as folder:
        cfg = demo_config(Path(folder) / "route", training_tokens=training_tokens, seed=seed)
        cfg.sae = replace(cfg.sae, b_dec_init="zeros")
        RouteSAETrainingRunner(cfg, override_model=model).run()
        route = SAE.load_from_disk(Path(folder) / "route")
        topk = train_topk(model, cfg, Path(folder) / "topk")
        normalized = train_topk_normalized(model, cfg)
    evaluation = evaluate(model, route, "demo:heldout", max_tokens=eval_tokens)
    assert isinstance(evaluation.reconstruction, ReconstructionMetrics)
    assert evaluation.downstream is not None and evaluation.downstream_unscaled is not None

    def evaluated(reconstruct_stream: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        batches = activation_batches(model, route, "demo:heldout", max_tokens=eval_tokens)
        return evaluate_topk(model, reconstruct_stream, batches)

    return {
        "seed": seed,
        "route": {
            "norm_mse": evaluation.reconstruction.norm_mse,
            "kl": evaluation.downstream.kl,
            "kl_unscaled": evaluation.downstream_unscaled.kl,
            "share_by_block": evaluation.reconstruction.share_by_block,
            "kl_by_block": evaluation.downstream.kl_by_block,
        },
        "topk_layer_norm": evaluated(topk),
        "topk_normalized": evaluated(partial(normalized_reconstruction, normalized)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--training-tokens", type=int, default=1_000_000)
    parser.add_argument("--eval-tokens", type=int, default=30_000)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    runs = []
    for seed in range(args.seeds):
        runs.append(compare(seed, args.training_tokens, args.eval_tokens))
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({**vars(args), "output": None, "runs": runs}, indent=1))
    print(f"{'':16}{'NormMSE':>10}{'KL nats/token':>16}")
    for name in ("route", "topk_layer_norm", "topk_normalized"):
        mse = statistics.mean(run[name]["norm_mse"] for run in runs)
        kl = statistics.mean(run[name]["kl"] for run in runs)
        print(f"{name:16}{mse:10.4f}{kl:16.4f}")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
