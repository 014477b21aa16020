"""Speed of `sae_lens_route.features`, as ratios of times measured in turn in one process.

1. Table: tokens/s of `ContextCollector.add` over a stream of feature activations, table read out at
   the end, compared with two loops over the single activations, on the same activations: "loop"
   cuts the sentence and writes the text of each activation before pushing it on a heap, as the
   paper's code does; "lean loop" pushes numbers only and writes no text.
2. Model: forward pass, routing, encoding and contexts, compared with the forward pass alone,
   stopped after the last routed block (the cheapest pass that yields the activations) and run to
   the logits.

The model, the SAE and the vocabulary are random; tokens follow Zipf's law.

    python benchmarks/contexts.py --output contexts_benchmark.json
    python benchmarks/contexts.py --tiny
"""

from __future__ import annotations

import argparse
import heapq
import json
import platform
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
import transformer_lens
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import PreTrainedTokenizerFast

from sae_lens_route.data.reading import activation_batches
from sae_lens_route.features.contexts import ContextCollector
from sae_lens_route.features.sentences import CLOSE, OPEN, REFERENCE_SENTENCE_ENDS
from sae_lens_route.features.table import ContextOptions
from sae_lens_route.saes import RouteTopKSAE, RouteTopKSAEConfig


@dataclass(frozen=True)
class Shape:
    """The benchmark's CPU shape, unless `--tiny`."""

    n_layers: int = 16
    d_model: int = 256
    d_vocab: int = 8192
    d_sae: int = 2048
    k: int = 32
    batch: int = 8
    context_size: int = 256
    first: int = 3
    last: int = 11
    share: float = 0.01
    """Of tokens x features, how many exceed the threshold."""

    @property
    def routed_blocks(self) -> list[int]:
        return list(range(self.first, self.last + 1))

    @property
    def hook_names(self) -> list[str]:
        return [f"blocks.{block}.hook_resid_post" for block in self.routed_blocks]


TINY = Shape(4, 32, 128, 64, 8, 2, 32, 1, 2, 0.05)


def make_model(shape: Shape) -> HookedTransformer:
    """Random and Llama-shaped: RMS norm, rotary positions, gated MLP."""
    return HookedTransformer(
        HookedTransformerConfig(
            n_layers=shape.n_layers,
            d_model=shape.d_model,
            n_ctx=shape.context_size,
            d_head=64 if shape.d_model >= 64 else 16,
            d_mlp=4 * shape.d_model,
            d_vocab=shape.d_vocab,
            act_fn="silu",
            gated_mlp=True,
            normalization_type="RMS",
            final_rms=True,
            positional_embedding_type="rotary",
            init_weights=True,
            seed=0,
        )
    ).eval()


def make_sae(shape: Shape) -> RouteTopKSAE:
    torch.manual_seed(0)
    sae = RouteTopKSAE(
        RouteTopKSAEConfig(
            d_in=shape.d_model,
            d_sae=shape.d_sae,
            k=shape.k,
            n_routed_layers=len(shape.hook_names),
        )
    )
    sae.cfg.metadata.hook_names = shape.hook_names
    return sae.eval()


def make_tokenizer(shape: Shape) -> PreTrainedTokenizerFast:
    """BOS, sentence ends, and words in three spellings, so that a class has several tokens."""
    raw = ["<|end_of_text|>", "Ġthe", ".", ",", "!", "?", '"']
    raw += [(f"Ġw{i}", f"ĠW{i}", f"w{i}")[j] for i in range(shape.d_vocab) for j in range(3)][
        : shape.d_vocab - len(raw)
    ]
    tokenizer = Tokenizer(WordLevel({token: i for i, token in enumerate(raw)}, unk_token=raw[0]))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=raw[0])


def make_collector(shape: Shape, tokenizer: Any, threshold: float) -> ContextCollector:
    options = ContextOptions(threshold=threshold)
    return ContextCollector(
        shape.d_model, shape.d_sae, shape.routed_blocks, shape.hook_names, tokenizer, options
    )


def draw_tokens(shape: Shape, generator: torch.Generator) -> Tensor:
    ranks = 1 / (torch.arange(shape.d_vocab) + 2.7)
    ranks[0] = 0
    n = shape.batch * shape.context_size
    return torch.multinomial(ranks, n, True, generator=generator).view(shape.batch, -1)


@dataclass
class Encoded:
    """One batch as the table and the loops take it."""

    tokens: Tensor
    acts: Tensor
    route: Tensor
    weight: Tensor


class Stream:
    """Feature activations that depend on the token and on noise, without a model."""

    def __init__(self, shape: Shape, sae: RouteTopKSAE) -> None:
        self.shape, self.sae = shape, sae
        self.generator = torch.Generator().manual_seed(1)
        self.embedding = torch.randn(shape.d_vocab, shape.d_model, generator=self.generator)

    @torch.no_grad()
    def batch(self) -> Encoded:
        tokens = draw_tokens(self.shape, self.generator)
        size = (*tokens.shape, len(self.shape.hook_names), self.shape.d_model)
        x = self.embedding[tokens].unsqueeze(2) + torch.randn(size, generator=self.generator)
        routing = self.sae.route(x)
        acts = self.sae.encode(routing.x_route)
        return Encoded(tokens, acts, routing.route, routing.weight)


def loop(
    batch: Encoded, tokenizer: Any, threshold: float, heaps: Any, max_length: int = 64
) -> None:
    """As the paper's code works: each activation's sentence and text, then its heap."""
    for b in range(len(batch.tokens)):
        raw = tokenizer.convert_ids_to_tokens(batch.tokens[b].tolist())
        acts = batch.acts[b]
        for index in (acts > threshold).nonzero():
            s, feature = index.tolist()
            activation = acts[s, feature].item()
            first = last = s
            while first > 0 and raw[first - 1] not in REFERENCE_SENTENCE_ENDS:
                first -= 1
            while last < len(raw) - 1 and raw[last] not in REFERENCE_SENTENCE_ENDS:
                last += 1
            if last - first + 1 > max_length:
                first = max(first, s - max_length // 2)
                last = min(last, s + max_length // 2)
            window = [*raw[first:s], OPEN, raw[s], CLOSE, *raw[s + 1 : last + 1]]
            text = tokenizer.convert_tokens_to_string(window)
            heap = heaps[feature][raw[s].strip().lower()]
            heapq.heappush(heap, (activation, text))
            if len(heap) > 2:
                heapq.heappop(heap)


def lean_loop(batch: Encoded, classes: list[str], threshold: float, heaps: Any) -> None:
    """A loop's minimum: read every activation as a number and keep the two strongest."""
    at = (batch.acts > threshold).nonzero()
    values = batch.acts[at[:, 0], at[:, 1], at[:, 2]].tolist()
    tokens = batch.tokens.tolist()
    for (b, s, feature), activation in zip(at.tolist(), values, strict=True):
        heap = heaps[feature, classes[tokens[b][s]]]
        if len(heap) < 2:
            heapq.heappush(heap, (activation, b, s))
        elif activation > heap[0][0]:
            heapq.heapreplace(heap, (activation, b, s))


class Clock:
    """Wall and processor seconds of each call; a busy machine disturbs the latter less."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def time(self, work: Callable[..., Any], *args: Any) -> Any:
        wall, cpu = perf_counter(), process_time()
        result = work(*args)
        self.wall.append(perf_counter() - wall)
        self.cpu.append(process_time() - cpu)
        return result

    @property
    def seconds(self) -> tuple[float, float]:
        """Wall and processor seconds of all calls."""
        return sum(self.wall), sum(self.cpu)


def table_benchmark(shape: Shape, n_tokens: int, n_looped: int) -> dict[str, Any]:
    """Rates over the whole stream for the table, over `n_looped` batches spread over it for loops.

    A loop's time per activation does not depend on where in the stream it is measured, while the
    table's falls as it fills: therefore the table's time includes every batch and the read-out.
    """
    sae, tokenizer = make_sae(shape), make_tokenizer(shape)
    stream = Stream(shape, sae)
    per_batch = shape.batch * shape.context_size
    n_batches = max(n_tokens // per_batch, 2)
    warm = stream.batch()
    active = warm.acts[warm.acts > 0]
    share = min(shape.share * warm.acts.numel() / len(active), 1.0)
    threshold = float(active.float().quantile(1 - share))
    collector = make_collector(shape, tokenizer, threshold)
    classes = [
        t.strip().lower() for t in tokenizer.convert_ids_to_tokens(list(range(shape.d_vocab)))
    ]
    heaps: Any = defaultdict(lambda: defaultdict(list))
    lean_heaps: Any = defaultdict(list)
    add, read_out, full, lean = Clock(), Clock(), Clock(), Clock()
    n_above, looped_above = 0, 0
    loop_at = {n_batches * (2 * i + 1) // (2 * n_looped) for i in range(n_looped)}
    for i in range(n_batches):
        batch = stream.batch()
        above = int((batch.acts > threshold).sum())
        n_above += above
        kept = torch.ones_like(batch.tokens, dtype=torch.bool)
        add.time(collector.add, batch.tokens, batch.acts, batch.route, batch.weight, kept)
        if i in loop_at:
            looped_above += above
            full.time(loop, batch, tokenizer, threshold, heaps)
            lean.time(lean_loop, batch, classes, threshold, lean_heaps)
    table = read_out.time(collector.table)
    n_stream = per_batch * n_batches
    looped = per_batch * len(full.wall)
    result: dict[str, Any] = {
        "tokens": n_stream,
        "batches_looped": len(full.wall),
        "above_threshold_per_token_and_feature": n_above / (n_stream * shape.d_sae),
        "contexts": table.contexts.num_rows,
    }
    for kind, clock in enumerate(("wall", "cpu")):
        added, wrote, ran, leaned = (c.seconds[kind] for c in (add, read_out, full, lean))
        batches = add.wall if kind == 0 else add.cpu
        tenth = max(n_batches // 10, 1)
        result[clock] = {
            "tokens_per_s": n_stream / (added + wrote),
            "tokens_per_s_without_read_out": n_stream / added,
            "read_out_s": wrote,
            "ms_per_batch_median": 1e3 * statistics.median(batches),
            "ms_per_batch_first_tenth": 1e3 * statistics.mean(batches[:tenth]),
            "ms_per_batch_last_tenth": 1e3 * statistics.mean(batches[-tenth:]),
            "loop_tokens_per_s": looped / ran,
            "loop_us_per_activation": 1e6 * ran / looped_above,
            "lean_loop_tokens_per_s": looped / leaned,
            "lean_loop_us_per_activation": 1e6 * leaned / looped_above,
            "times_the_loop": n_stream / (added + wrote) / (looped / ran),
            "times_the_lean_loop": n_stream / added / (looped / leaned),
        }
    return result


def model_benchmark(shape: Shape, rounds: int) -> dict[str, Any]:
    """Medians of one batch, three ways in turn; the first round is dropped."""
    model, sae, tokenizer = make_model(shape), make_sae(shape), make_tokenizer(shape)
    generator = torch.Generator().manual_seed(2)
    warm = draw_tokens(shape, generator)
    (batch,) = activation_batches(model, sae, warm, batch_size=shape.batch)
    with torch.no_grad():
        acts = sae.encode_layers(batch.activations)
    active = acts[acts > 0]
    share = min(shape.share * acts.numel() / len(active), 1.0)
    threshold = float(active.quantile(1 - share))
    collector = make_collector(shape, tokenizer, threshold)

    def contexts(tokens: Tensor) -> None:
        for batch in activation_batches(model, sae, tokens, batch_size=shape.batch):
            routing = sae.route(batch.activations)
            acts = sae.encode(routing.x_route)
            collector.add(batch.tokens, acts, routing.route, routing.weight, batch.kept)

    def forward(tokens: Tensor) -> None:
        model(tokens, stop_at_layer=shape.last + 1)

    def forward_to_logits(tokens: Tensor) -> None:
        model(tokens)

    works = (forward, contexts, forward_to_logits)
    clocks = {work.__name__: Clock() for work in works}
    read_out = Clock()
    with torch.no_grad():
        for _ in range(rounds + 1):
            tokens = draw_tokens(shape, generator)
            for work in works:
                clocks[work.__name__].time(work, tokens)
        table = read_out.time(collector.table)
    result: dict[str, Any] = {"rounds": rounds, "contexts": table.contexts.num_rows}
    for kind in ("wall", "cpu"):
        seconds = {name: getattr(clock, kind)[1:] for name, clock in clocks.items()}
        ratios = [a / b for a, b in zip(seconds["contexts"], seconds["forward"], strict=True)]
        median = {name: statistics.median(values) for name, values in seconds.items()}
        result[kind] = {
            **{f"{name}_s": value for name, value in median.items()},
            "read_out_s": getattr(read_out, kind)[0],
            "times_forward_to_last_routed_block": median["contexts"] / median["forward"],
            "times_forward_median_of_ratios": statistics.median(ratios),
            "times_forward_to_logits": median["contexts"] / median["forward_to_logits"],
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a size for the tests")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="length of the stream")
    parser.add_argument("--rounds", type=int, default=10, help="batches through the model")
    parser.add_argument("--threads", type=int, help="torch threads")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    shape = TINY if args.tiny else Shape()
    result = {
        "shape": shape.__dict__,
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformer_lens": getattr(transformer_lens, "__version__", None),
        },
        "table": table_benchmark(shape, 512 if args.tiny else args.tokens, 2 if args.tiny else 8),
        "model": model_benchmark(shape, 2 if args.tiny else args.rounds),
    }
    for part in ("table", "model"):
        wall, cpu = result[part]["wall"], result[part]["cpu"]
        print(f"\n{part:40} {'wall':>14} {'processor':>14}")
        for name in wall:
            print(f"  {name:38} {wall[name]:14,.3f} {cpu[name]:14,.3f}")
        for name, value in result[part].items():
            if not isinstance(value, dict):
                print(f"  {name:38} {value:14,.4g}")
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
