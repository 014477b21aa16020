"""RouteSAE against a TopK SAE of the same size at block 11, on the demo model (paper, Figure 4).

    python benchmarks/topk_at_block_11.py --output benchmarks/results/topk_at_block_11.json

Both see the same tokens in the same order, with the same k, d_sae, learning rate and schedule. The
TopK SAE is trained by SAELens's own runner on its own class, with per-token normalisation as the
RouteSAE has (`layer_norm`), and its other defaults. Both are spliced at the same held-out tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from sae_lens import (
    SAE,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    TopKTrainingSAEConfig,
)

from sae_lens_route.activations import RoutedActivationsStore, load_text_dataset
from sae_lens_route.demo import demo_config
from sae_lens_route.evals import evaluate, token_error
from sae_lens_route.models import load_model
from sae_lens_route.router import normalize
from sae_lens_route.runner import RouteSAETrainingRunner

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
        dead_feature_window=10**9,  # its auxiliary loss refuses normalised activations
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


@torch.no_grad()
def evaluate_topk(
    model: Any, sae: SAE[Any], text: RoutedActivationsStore, max_tokens: int
) -> dict[str, float]:
    """NormMSE in normalised units and KL in nats per token, at kept tokens."""
    kl, error, n = 0.0, 0.0, 0
    for tokens in text.token_batches(max_tokens):
        kept = text.kept(tokens)

        def reconstruct(x: torch.Tensor, hook: Any, kept: torch.Tensor = kept) -> torch.Tensor:
            nonlocal error
            x_hat = sae(x)
            # the error of x_hat in the units the RouteSAE's is measured in: x's own mean and scale
            mean, scale = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
            error += float(token_error(normalize(x), (x_hat - mean) / scale)[kept].sum())
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
        RouteSAETrainingRunner(cfg, override_model=model).run()
        route = SAE.load_from_disk(Path(folder) / "route")
        topk = train_topk(model, cfg, Path(folder) / "topk")
    evaluation = evaluate(model, route, "demo:heldout", max_tokens=eval_tokens)
    assert evaluation.downstream is not None and evaluation.downstream_unscaled is not None
    text = RoutedActivationsStore.from_sae(model, route, "demo:heldout")
    return {
        "seed": seed,
        "route": {
            "norm_mse": evaluation.reconstruction.norm_mse,
            "kl": evaluation.downstream.kl,
            "kl_unscaled": evaluation.downstream_unscaled.kl,
            "share": evaluation.reconstruction.share,
            "kl_by_layer": evaluation.downstream.kl_by_layer,
        },
        "topk_block_11": evaluate_topk(model, topk, text, eval_tokens),
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
    for name in ("route", "topk_block_11"):
        mse = statistics.mean(run[name]["norm_mse"] for run in runs)
        kl = statistics.mean(run[name]["kl"] for run in runs)
        print(f"{name:16}{mse:10.4f}{kl:16.4f}")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
