"""Cost of a routed hook point, as ratios to a clean forward pass timed in turn in one process.

    read          attached, x_route cached, nothing edited
    edited        with the RouteSAE in (`add_sae`, or on a proxy a hook function)
    hook function the same edit by a hook function, which is called for every routed block in full
    two passes    a splice without the replay: one pass to route, one pass to edit

The model and the SAE are random, so that every routed block gets tokens. Each round times each of
them once, between two clean passes, and divides by the mean of these two. "cpu" is the same ratio
of processor time, which other programs on the machine disturb less (with --threads 1).

    python benchmarks/splice.py --output splice_benchmark.json
    python benchmarks/splice.py --tiny
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
import transformers
from sae_lens import HookedSAETransformer
from sae_lens.load_model import HookedProxyLM
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor
from transformer_lens import HookedTransformerConfig
from transformers import LlamaConfig, LlamaForCausalLM

from sae_lens_route.models.kinds import decoder_blocks
from sae_lens_route.saes import RouteTopKSAE, RouteTopKSAEConfig
from sae_lens_route.saes.router import normalization_stats
from sae_lens_route.splice import attach

HOOK = "hook function"


@dataclass(frozen=True)
class Shape:
    """The benchmark's CPU shape, unless `--tiny`."""

    n_layers: int = 16
    d_model: int = 256
    d_mlp: int = 1024
    d_vocab: int = 8192
    n_heads: int = 8
    d_sae: int = 2048
    k: int = 32
    batch: int = 8
    context_size: int = 256
    first: int = 3
    last: int = 11

    @property
    def routed_blocks(self) -> list[int]:
        return list(range(self.first, self.last + 1))

    @property
    def target(self) -> float:
        """(16 + 8) / 16 * 1.25: the replayed blocks, and a quarter for the rest."""
        return (self.n_layers + self.last - self.first) / self.n_layers * 1.25


TINY = Shape(
    n_layers=4,
    d_model=32,
    d_mlp=64,
    d_vocab=128,
    n_heads=2,
    d_sae=64,
    k=8,
    batch=2,
    context_size=16,
    first=1,
    last=2,
)


def hooked_model(shape: Shape) -> HookedSAETransformer:
    cfg = HookedTransformerConfig(
        n_layers=shape.n_layers,
        d_model=shape.d_model,
        n_ctx=shape.context_size,
        n_heads=shape.n_heads,
        d_head=shape.d_model // shape.n_heads,
        d_mlp=shape.d_mlp,
        d_vocab=shape.d_vocab,
        act_fn="silu",
        gated_mlp=True,
        normalization_type="RMS",
        final_rms=True,
        positional_embedding_type="rotary",
        rotary_dim=shape.d_model // shape.n_heads,
        seed=0,
    )
    return HookedSAETransformer(cfg).eval()


def proxy_model(shape: Shape) -> HookedProxyLM:
    torch.manual_seed(0)
    cfg = LlamaConfig(
        hidden_size=shape.d_model,
        intermediate_size=shape.d_mlp,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        vocab_size=shape.d_vocab,
        max_position_embeddings=shape.context_size,
        initializer_range=shape.d_model**-0.5,
        use_cache=False,
    )
    hooked = [f"model.layers.{i}" for i in shape.routed_blocks]
    return HookedProxyLM(LlamaForCausalLM(cfg).eval(), None, hook_names=hooked)  # type: ignore[arg-type]


MODELS: dict[str, Callable[[Shape], Any]] = {
    "HookedTransformer": hooked_model,
    "Hugging Face proxy": proxy_model,
}


def make_sae(shape: Shape) -> RouteTopKSAE:
    torch.manual_seed(0)
    metadata = SAEMetadata(
        hook_name=f"blocks.{shape.last}.route.hook_resid_post",
        hook_names=[f"blocks.{i}.hook_resid_post" for i in shape.routed_blocks],
    )
    sae = RouteTopKSAE(
        RouteTopKSAEConfig(
            d_in=shape.d_model,
            d_sae=shape.d_sae,
            k=shape.k,
            n_routed_layers=len(shape.routed_blocks),
            metadata=metadata,
        )
    )
    for weight in (sae.W_router, sae.W_enc, sae.W_dec):
        torch.nn.init.normal_(weight, std=weight.shape[0] ** -0.5)
    return sae.eval()


def two_passes(model: Any, sae: RouteTopKSAE, shape: Shape, tokens: Tensor) -> Tensor:
    """Route in a first pass over the routed blocks' outputs, edit them in a second one."""
    blocks = decoder_blocks(model)
    streams: list[Tensor] = []

    def keep(module: Any, args: Any, output: Tensor) -> None:
        streams.append(output)

    handles = [blocks[block].register_forward_hook(keep) for block in shape.routed_blocks]
    model(tokens, return_type="logits")
    for handle in handles:
        handle.remove()
    routing = sae.route(torch.stack(streams, -2))
    weight = routing.weight.unsqueeze(-1)

    def edit(route: int, module: Any, args: Any, x: Tensor) -> Tensor:
        mean, scale = (part.unsqueeze(-1) for part in normalization_stats(x))
        x_hat = sae.decode(sae.encode(weight * (x - mean) / scale)) / weight * scale + mean
        return torch.where((routing.route == route).unsqueeze(-1), x_hat, x)

    handles = [
        blocks[block].register_forward_hook(partial(edit, route))
        for route, block in enumerate(shape.routed_blocks)
    ]
    logits = model(tokens, return_type="logits")
    for handle in handles:
        handle.remove()
    return logits


def contestants(model: Any, shape: Shape, tokens: Tensor) -> dict[str, Callable[[], Any]]:
    sae = make_sae(shape)
    name = sae.cfg.metadata.hook_name

    def clean() -> Any:
        return model(tokens, return_type="logits")

    def read() -> Any:
        with attach(model, sae):
            return model.run_with_cache(tokens, names_filter=[name])[0]

    def by_hook() -> Any:
        with attach(model, sae):
            hooks = [(name, lambda value, hook: sae.decode(sae.encode(value)))]
            return model.run_with_hooks(tokens, fwd_hooks=hooks, return_type="logits")

    def edited() -> Any:
        with attach(model, sae):
            return model.run_with_saes(tokens, saes=[sae])

    result = {"clean": clean, "read": read}
    if isinstance(model, HookedSAETransformer):
        result["edited"] = edited
    return result | {
        HOOK: by_hook,
        "two passes": lambda: two_passes(model, sae, shape, tokens),
    }


def measure(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Medians over the rounds of the seconds, and of the ratios to the clean passes around."""

    def times(run: Callable[[], Any]) -> tuple[float, float]:
        start, cpu_start = perf_counter(), process_time()
        run()
        return perf_counter() - start, process_time() - cpu_start

    taken: dict[str, list[float]] = {name: [] for name in runs}
    ratios: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for round_index in range(-1, rounds):  # the first one warms up
        before = times(runs["clean"])
        for name in list(runs)[1:]:
            this, after = times(runs[name]), times(runs["clean"])
            if round_index >= 0:
                taken["clean"].append(after[0])
                taken[name].append(this[0])
                wall, cpu = (2 * t / (a + b) for t, a, b in zip(this, before, after, strict=True))
                ratios[name].append((wall, cpu))
                ratios["clean"].append((after[0] / before[0], after[1] / before[1]))
            before = after
    return {
        name: {
            "seconds": statistics.median(taken[name]),
            "ratio": statistics.median(wall for wall, _ in ratios[name]),
            "lowest": min(wall for wall, _ in ratios[name]),
            "highest": max(wall for wall, _ in ratios[name]),
            "cpu": statistics.median(cpu for _, cpu in ratios[name]),
        }
        for name in runs
    }


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tiny", action="store_true", help="a size for the tests")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--output", type=Path, default=None, help="where to write JSON")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    shape = TINY if options.tiny else Shape()
    rounds = options.rounds or (2 if options.tiny else 7)
    tokens = torch.randint(shape.d_vocab, (shape.batch, shape.context_size))

    result: dict[str, Any] = {
        "shape": vars(shape),
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformer-lens": version("transformer-lens"),
            "transformers": transformers.__version__,
        },
        "target": {"edited": shape.target, "read": 1.05},
        "models": {},
    }
    for kind, make in MODELS.items():
        runs = contestants(make(shape), shape, tokens)
        result["models"][kind] = table = measure(runs, rounds)
        print(f"\n{kind}, {rounds} rounds, {result['threads']} threads, {result['versions']}")
        print(f"{'':16}{'seconds':>10}{'ratio':>8}{'lowest':>9}{'highest':>9}{'cpu':>8}")
        for name, row in table.items():
            numbers = f"{row['seconds']:10.3f}{row['ratio']:8.2f}"
            spread = f"{row['lowest']:9.2f}{row['highest']:9.2f}"
            print(f"{name:16}{numbers}{spread}{row['cpu']:8.2f}", flush=True)
    print(f"\ntargets: edited <= {shape.target:.3f}, read <= 1.05")
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
