"""Cost of evaluating a dictionary, relative to the forward pass up to the last routed block.

    python benchmarks/evaluation.py --output benchmarks/results/evaluation.json
    python benchmarks/evaluation.py --model FOLDER --d-sae 4608 --output FILE    # in bfloat16

Timed in turn in one process (A B C, A B C, ...) on the same tokens, the first round dropped; times
are divided by the same round's A, and the results are medians over rounds:

(A) the forward pass up to the last routed block;
(B) the whole forward pass, with logits;
(C) `evaluate_all` of 1 RouteSAE, of `--dictionaries` of them, and of the same with both splices.

What a dictionary costs is the difference of many to 1 over the difference in number: reading the
text and the clean pass are shared. The routers are random, so every block gets tokens.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from sae_lens.load_model import HookedProxyLM
from sae_lens.saes.sae import SAEMetadata
from transformers import LlamaConfig, LlamaForCausalLM

from sae_lens_route import load_model
from sae_lens_route.config import routed_hook_name
from sae_lens_route.data.activations import residual_streams
from sae_lens_route.evals.evaluate import evaluate_all
from sae_lens_route.models.kinds import (
    d_model,
    default_routed_blocks,
    model_device,
    n_layers,
    residual_hook_names,
    vocabulary_size,
)
from sae_lens_route.saes import RouteTopKSAE, RouteTopKSAEConfig

TARGET = 4.0
"""A dictionary should cost at most this many forward passes."""


@dataclass(frozen=True)
class Shape:
    """Sizes of the random model (ignored with `--model`), the dictionaries and the text."""

    d: int
    heads: int
    vocab: int
    n_blocks: int
    d_sae: int
    k: int
    prompts: int
    context: int


SHAPES = {
    "tiny": Shape(32, 2, 64, 4, 64, 4, 2, 16),
    "cpu": Shape(256, 4, 8192, 16, 2048, 32, 8, 256),
    "gpu": Shape(2048, 32, 128256, 16, 16384, 64, 64, 512),
}


def random_model(shape: Shape, device: str) -> HookedProxyLM:
    """A Llama with random weights; of the kinds of model, the proxy has the fastest attention."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.d,
        intermediate_size=4 * shape.d,
        num_hidden_layers=shape.n_blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        vocab_size=shape.vocab,
        max_position_embeddings=shape.context,
    )
    return HookedProxyLM(LlamaForCausalLM(config).eval().to(device), None)  # type: ignore[arg-type]


def random_sae(model: Any, shape: Shape, seed: int) -> RouteTopKSAE:
    torch.manual_seed(seed)
    blocks = default_routed_blocks(n_layers(model))
    metadata = SAEMetadata(
        hook_name=routed_hook_name(blocks[-1]),
        hook_names=residual_hook_names(model, blocks),
        context_size=shape.context,
        exclude_special_tokens=False,
    )
    d = d_model(model)
    config = RouteTopKSAEConfig(
        d_in=d, d_sae=shape.d_sae, k=shape.k, n_routed_layers=len(blocks), metadata=metadata
    )
    sae = RouteTopKSAE(config)
    for weight in (sae.W_router, sae.W_enc):
        torch.nn.init.normal_(weight, std=d**-0.5)
    sae.W_dec.data = sae.W_enc.data.t().contiguous()
    return sae.to(model_device(model))


def variants(
    model: Any, shape: Shape, n_dictionaries: int, n_batches: int
) -> dict[str, Callable[[], Any]]:
    """What to time; each reads the same tokens once."""
    size = (n_batches * shape.prompts, shape.context)
    tokens = torch.randint(2, vocabulary_size(model), size)
    saes = {f"{i}": random_sae(model, shape, i) for i in range(n_dictionaries)}
    names = residual_hook_names(model, default_routed_blocks(n_layers(model)))
    batches = [batch.to(model_device(model)) for batch in tokens.split(shape.prompts)]

    def evaluated(n: int, unscaled: bool = False) -> Any:
        chosen = dict(list(saes.items())[:n])
        return evaluate_all(model, chosen, tokens, batch_size=shape.prompts, unscaled=unscaled)

    return {
        "forward": lambda: [residual_streams(model, batch, names) for batch in batches],
        "whole forward": lambda: [model(batch, return_type="logits").sum() for batch in batches],
        "1": lambda: evaluated(1),
        "1, both splices": lambda: evaluated(1, unscaled=True),
        "many": lambda: evaluated(n_dictionaries),
        "many, both splices": lambda: evaluated(n_dictionaries, unscaled=True),
    }


@torch.no_grad()
def ratios_of(timed: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each in every round over the seconds of "forward"; the first round warms up."""
    ratios: dict[str, list[float]] = {name: [] for name in timed}
    for i in range(rounds + 1):
        seconds = {}
        for name, run in timed.items():
            started = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name] = time.perf_counter() - started
        for name, taken in seconds.items():
            if i > 0:
                ratios[name].append(taken / seconds["forward"])
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="cpu")
    parser.add_argument("--model", help="folder of a model, to use in bfloat16 as a proxy")
    parser.add_argument("--d-sae", type=int, help="instead of the shape's")
    parser.add_argument("--dictionaries", type=int, default=4)
    parser.add_argument("--batches", type=int, default=2, help="batches of the shape's contexts")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    if args.d_sae:
        shape = replace(shape, d_sae=args.d_sae)
    if args.model:
        model: Any = load_model(
            args.model, "AutoModelForCausalLM", device=args.device, dtype="bfloat16"
        )
    else:
        model = random_model(shape, args.device)
    ratios = ratios_of(variants(model, shape, args.dictionaries, args.batches), args.rounds)
    for suffix in ("", ", both splices"):
        pairs = zip(ratios[f"many{suffix}"], ratios[f"1{suffix}"], strict=True)
        each = [(many - one) / (args.dictionaries - 1) for many, one in pairs]
        ratios[f"a dictionary{suffix}"] = each
    medians = {name: statistics.median(values) for name, values in ratios.items()}
    content = {
        "shape": vars(shape),
        "model": Path(args.model).name if args.model else "random",
        "dtype": str(next(model.parameters()).dtype),
        "blocks": default_routed_blocks(n_layers(model)),
        "dictionaries": args.dictionaries,
        "batches": args.batches,
        "rounds": args.rounds,
        "threads": torch.get_num_threads(),
        "device": args.device,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: version(name) for name in ("sae-lens", "transformers")},
        },
        "target": TARGET,
        "ratio_to_forward": medians,
        "ratio_to_whole_forward": {
            name: value / medians["whole forward"] for name, value in medians.items()
        },
        "ratio_to_forward_by_round": ratios,
    }
    print(f"{content['model']}, {content['dtype']}, {content['threads']} threads")
    print(f"{'':28}{'x forward':>10}{'least':>8}{'most':>8}{'x whole forward':>17}")
    for name, values in ratios.items():
        whole = medians[name] / medians["whole forward"]
        row = f"{medians[name]:10.2f}{min(values):8.2f}{max(values):8.2f}{whole:17.2f}"
        print(f"{name:28}{row}")
    print(f"target: a dictionary costs at most {TARGET} forward passes")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
