"""Cost of a training step relative to the language model's forward pass, which is its floor.

    python benchmarks/training_step.py --output benchmarks/results/training_step.json

Timed in turn in one process (A B C D, A B C D, ...), medians, the first round dropped:

(a) the forward pass up to the last routed block: the floor;
(b) a RouteSAE step: (a), routing and the SAE's update;
(c) SAELens training one TopK SAE at the last routed block of the same model;
(d) the paper's step as its code does it: all blocks and the LM head in float32, every hidden state
    normalized and kept, dense decode.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from random_llama import random_llama
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.sae_trainer import SAETrainer
from torch import nn

from sae_lens_route import RouteSAERunnerConfig, RouteTopKTrainingSAEConfig, load_model
from sae_lens_route.data.activations import RoutedActivationsStore, residual_streams
from sae_lens_route.saes import RouteTopKTrainingSAE
from sae_lens_route.saes.router import normalize

SHAPES = {
    "tiny": {"d": 32, "heads": 2, "vocab": 64, "d_sae": 64, "k": 4, "prompts": 2, "context": 16},
    "cpu": {
        "d": 256, "heads": 4, "vocab": 8192, "d_sae": 2048, "k": 32, "prompts": 8, "context": 256,
    },
    "gpu": {
        "d": 2048, "heads": 32, "vocab": 128256, "d_sae": 16384, "k": 64, "prompts": 64,
        "context": 512,
    },
}  # fmt: skip


def trainer(sae: Any, tokens: int, device: str) -> SAETrainer[Any, Any]:
    cfg = SAETrainerConfig(
        total_training_samples=10**9, train_batch_size_samples=tokens, device=device, lr_end=1e-4
    )
    return SAETrainer(cfg, sae.to(device), data_provider=iter(()))


def variants(shape: dict[str, int], folder: Path, kind: str, device: str) -> dict[str, Callable]:
    """The four things to time; each call is one step over the same number of tokens."""
    model = load_model(str(random_llama(shape, folder)), kind, device=device)
    n_tokens = shape["prompts"] * shape["context"]
    rows = torch.randint(2, shape["vocab"], (64 * shape["prompts"], shape["context"]))
    data = Dataset.from_dict({"tokens": rows.tolist()})
    cfg = RouteSAERunnerConfig(
        sae=RouteTopKTrainingSAEConfig(d_in=shape["d"], d_sae=shape["d_sae"], k=shape["k"]),
        model_name=str(folder),
        dataset_path="",
        context_size=shape["context"],
        store_batch_size_prompts=shape["prompts"],
        exclude_special_tokens=False,
        device=device,
        output_path=None,
    )
    cfg.resolve(model)
    hook_names = cfg.hook_names or []
    routed = RoutedActivationsStore.from_config(model, cfg, override_dataset=data)
    route_trainer = trainer(RouteTopKTrainingSAE(cfg.sae), n_tokens, device)

    single = ActivationsStore.from_config_multi_hook(
        model,
        dataset=data,
        hook_names=[hook_names[-1]],
        hook_d_ins={hook_names[-1]: shape["d"]},
        context_size=shape["context"],
        store_batch_size_prompts=shape["prompts"],
        train_batch_size_tokens=n_tokens,
        n_batches_in_buffer=shape["prompts"],
        activations_mixing_fraction=0.0,
        device=device,
    )
    topk = TopKTrainingSAEConfig(d_in=shape["d"], d_sae=shape["d_sae"], k=shape["k"])
    topk_trainer = trainer(TopKTrainingSAE(topk), n_tokens, device)

    reference = ReferenceStep(model, shape, device)

    def step(sae_trainer: SAETrainer[Any, Any], batch: torch.Tensor) -> None:
        sae_trainer.step(batch)
        sae_trainer.n_training_steps += 1

    return {
        "forward": lambda: residual_streams(model, routed.get_batch_tokens(), hook_names),
        "route": lambda: step(route_trainer, next(routed)),
        "saelens_topk": lambda: step(topk_trainer, next(single)),
        "paper": lambda: reference(routed.get_batch_tokens()),
    }


class ReferenceStep:
    """A step of the paper's published code, written from its description."""

    def __init__(self, model: Any, shape: dict[str, int], device: str) -> None:
        self.model, self.k = model, shape["k"]
        self.router = nn.Linear(shape["d"], 9, bias=False, device=device)
        self.encoder = nn.Linear(shape["d"], shape["d_sae"], device=device)
        self.decoder = nn.Linear(shape["d_sae"], shape["d"], device=device)
        parameters = [p for m in (self.router, self.encoder, self.decoder) for p in m.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=5e-4)

    def __call__(self, tokens: torch.Tensor) -> None:
        hf = self.model.model
        with torch.no_grad():
            states = hf(tokens, output_hidden_states=True, use_cache=False).hidden_states
            x = normalize(torch.stack(states[4:13], dim=2))
        p = self.router(x.sum(2)).softmax(-1)
        weight, route = p.max(-1)
        index = route[..., None, None].expand(*route.shape, 1, x.shape[-1])
        routed = weight.unsqueeze(-1) * x.gather(2, index).squeeze(2)
        top = self.encoder(routed).topk(self.k, dim=-1)
        dense = torch.zeros(*routed.shape[:-1], self.encoder.out_features, device=x.device)
        x_hat = self.decoder(dense.scatter(-1, top.indices, top.values))
        loss = ((x_hat - routed).pow(2).mean(-1) / routed.pow(2).mean(-1)).mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure(steps: dict[str, Callable], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each, timed in turn; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, required=True, help="folder for the random model")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    # SAELens's proxy has the fastest attention, hence the lowest floor
    kind = "AutoModelForCausalLM"
    steps = variants(SHAPES[args.shape], args.work, kind, args.device)
    medians = measure(steps, args.rounds, args.device)
    floor = medians["forward"]
    ratios = {name: value / floor for name, value in medians.items()}
    print(f"{args.shape}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, ratio in ratios.items():
        print(f"{name:14}{ratio:8.2f} x the forward pass to the last routed block")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "shape": SHAPES[args.shape],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rounds": args.rounds,
        "ratio_to_forward": ratios,
    }
    args.output.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
