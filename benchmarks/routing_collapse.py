"""Why the trained router sends nearly all tokens to one block, on the demo model.

    python benchmarks/routing_collapse.py --output benchmarks/results/routing_collapse.json

One stream of activations, many dictionaries with the demo's settings, except that `b_dec` starts at
0 as in the paper's code:

- trained:    the paper's objective;
- frozen:     the router stays at its random initialization;
- uniform:    a block drawn at random for every token;
- no biases:  b_enc and b_dec stay 0, so that the normalized loss cannot depend on p;
- centered:   the router reads v minus its mean over tokens;
- plain MSE:  Equation 12 as printed.

Also: how much of v all tokens share, and how the error of a token changes with p at each block.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_route import RouteSAERunnerConfig, activation_batches, load_model
from sae_lens_route.data.activations import RoutedActivationsStore
from sae_lens_route.data.reading import kept_activations
from sae_lens_route.demo import demo_config
from sae_lens_route.evals.reconstruction import reconstruction_metrics
from sae_lens_route.saes import RouteTopKTrainingSAE, RouteTopKTrainingSAEConfig, router
from sae_lens_route.saes.loss import norm_mse
from sae_lens_route.saes.metadata import routed_blocks
from sae_lens_route.saes.router import normalize

BIASES = ("b_enc", "b_dec")


def read(training_tokens: int, eval_tokens: int) -> tuple[RouteSAERunnerConfig, Tensor, Tensor]:
    """The demo's configuration, and its training and held-out activations `[tokens, L, d]`."""
    model = load_model("demo")
    cfg = demo_config("unused", training_tokens=training_tokens)
    cfg.resolve(model)
    store = RoutedActivationsStore.from_config(model, cfg)
    steps = tqdm(range(cfg.total_training_steps), desc="activations")
    train = torch.cat([next(store) for _ in steps])
    sae = routed_sae(cfg, cfg.sae)
    batches = activation_batches(model, sae, "demo:heldout", max_tokens=eval_tokens)
    return cfg, train, torch.cat(list(kept_activations(batches, sae)))


def routed_sae(cfg: RouteSAERunnerConfig, config: Any) -> RouteTopKTrainingSAE:
    """A new SAE with the metadata that a runner would write."""
    sae = RouteTopKTrainingSAE(config)
    metadata = sae.cfg.metadata
    metadata.hook_name, metadata.hook_names = cfg.hook_name, cfg.hook_names
    metadata.routed_blocks = cfg.routed_blocks
    metadata.context_size, metadata.prepend_bos = cfg.context_size, True
    metadata.exclude_special_tokens = True
    return sae


def train_one(
    cfg: RouteSAERunnerConfig, data: Tensor, seed: int, frozen: tuple[str, ...] = (), **options: Any
) -> tuple[RouteTopKTrainingSAE, float]:
    """A trained SAE, and how far its router moved relative to its initial norm."""
    torch.manual_seed(seed)
    sizes = {"d_in": cfg.sae.d_in, "d_sae": cfg.sae.d_sae, "k": cfg.sae.k}
    config = RouteTopKTrainingSAEConfig(**sizes, b_dec_init="zeros", **options)
    sae = routed_sae(cfg, config)
    initial = sae.W_router.detach().clone()
    for name in frozen:
        getattr(sae, name).requires_grad_(False)
    trainer = SAETrainer(cfg.to_sae_trainer_config(), sae, iter(()))
    for batch in data.split(cfg.step_tokens):
        trainer.step(batch)
        trainer.n_training_steps += 1
    sae.normalize_decoder()
    moved = (sae.W_router.detach() - initial).norm() / initial.norm()
    return sae, float(moved)


def centered_probs(mean_v: Tensor) -> Any:
    """`route_probs` of a router that reads v minus `mean_v`."""

    def probs(x: Tensor, mean: Tensor, scale: Tensor, W_router: Tensor, *_: Any) -> Tensor:
        v = ((x - mean.unsqueeze(-1)) / scale.unsqueeze(-1)).sum(-2)
        return torch.softmax((v - mean_v) @ W_router, dim=-1)

    return probs


@torch.no_grad()
def error_slope(sae: RouteTopKTrainingSAE, x: Tensor, step: float = 0.02) -> dict[int, float]:
    """d NormMSE / d p at p = 0.8, by central differences, of tokens routed to each block."""
    slopes = {}
    for block, stream in zip(routed_blocks(sae), x.unbind(1), strict=True):
        n = normalize(stream)
        high, low = (0.8 + step) * n, (0.8 - step) * n
        change = norm_mse(sae(high), high).mean() - norm_mse(sae(low), low).mean()
        slopes[block] = float(change) / (2 * step)
    return slopes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--training-tokens", type=int, default=1_000_000)
    parser.add_argument("--eval-tokens", type=int, default=20_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    cfg, train, heldout = read(args.training_tokens, args.eval_tokens)
    v = normalize(heldout).sum(1)
    shared = float(v.mean(0).pow(2).sum() / v.pow(2).sum(-1).mean())
    content: dict[str, Any] = {
        "training_tokens": len(train),
        "eval_tokens": len(heldout),
        "torch": torch.__version__,
        "shared_part_of_v": shared,
        "runs": [],
    }
    print(f"part of v's energy that all tokens share: {shared:.2f}")
    variants: dict[str, tuple[dict[str, Any], int]] = {
        "trained": ({}, args.seeds),
        "frozen": ({"frozen": ("W_router",)}, args.seeds),
        "uniform": ({"routing": "uniform"}, args.seeds),
        "no biases": ({"frozen": BIASES}, 1),
        "centered": ({}, 1),
        "plain MSE": ({"loss": "mse"}, 1),
    }
    for name, (options, seeds) in variants.items():
        for seed in range(seeds):
            patched = centered_probs(v.mean(0)) if name == "centered" else router.route_probs
            with mock.patch.object(router, "route_probs", patched):
                sae, moved = train_one(cfg, train, seed, **options)
                result = reconstruction_metrics(sae, heldout.split(2048))
            run = {"name": name, "seed": seed, "router_moved": moved, **result._asdict()}
            if name == "frozen":
                run["error_slope_by_block"] = error_slope(sae, heldout[:4096])
            content["runs"].append(run)
            shares = " ".join(f"{b}:{share:.2f}" for b, share in result.share_by_block.items())
            print(
                f"{name:10} seed {seed}  NormMSE {result.norm_mse:.3f}  matched "
                f"{result.norm_mse_matched:.3f}  mean p {result.route_weight:.2f}  router moved "
                f"{moved:.2f}  shares {shares}",
                flush=True,
            )
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
