"""Train the embedded demo model: a 16-block Llama on the Python standard library.

    python scripts/train_demo_model.py --out sae_lens_route/demo --work build/demo-model

Byte-level BPE tokenizer (2,048 tokens, trained on the training split), context 256, every window
starting with BOS as in TransformerLens. Muon for the block matrices, AdamW for the rest, constant
learning rate with a linear decay over the last 40 %. bfloat16 autocast through `torch.compile`:
about 9,000 tokens/s on two AVX512-BF16 cores. An interrupted run resumes from
`--work`. Weights are rounded to bfloat16 before the final evaluation, so the numbers in `INFO.json`
are those of the shipped file.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sae_lens_route.data.demo_corpus import documents

CONTEXT = 256
VOCABULARY = 2048
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
LIBRARY_COPIES = 2  # the library's files are repeated twice as often as its tests


def train_tokenizer(texts: tuple[str, ...]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, 0)]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, texts: tuple[str, ...]) -> list[np.ndarray]:
    """One array per document: BOS, its tokens, EOS."""
    return [
        np.array([*encoding.ids, 1], dtype=np.int64) for encoding in tokenizer.encode_batch(texts)
    ]


def windows(docs: list[np.ndarray]) -> Tensor:
    """Concatenated documents, cut into `[n, CONTEXT]` windows that all start with BOS."""
    stream = np.concatenate(docs)
    n = len(stream) // (CONTEXT - 1)
    body = stream[: n * (CONTEXT - 1)].reshape(n, CONTEXT - 1)
    return torch.from_numpy(np.concatenate([np.zeros((n, 1), np.int64), body], axis=1))


class Batches:
    """Endless batches; documents and windows are shuffled again in every epoch."""

    def __init__(self, docs: list[np.ndarray], batch_size: int, start: int) -> None:
        self.docs, self.batch_size = docs, batch_size
        self.epoch, self.position = -1, 0
        self.data = torch.empty(0, CONTEXT, dtype=torch.long)
        for _ in range(start):
            self.advance()

    def advance(self) -> int:
        if self.position + self.batch_size > len(self.data):
            self.epoch, self.position = self.epoch + 1, 0
            rng = np.random.default_rng(self.epoch)
            self.data = windows([self.docs[i] for i in rng.permutation(len(self.docs))])
            self.data = self.data[torch.from_numpy(rng.permutation(len(self.data)))]
        self.position += self.batch_size
        return self.position - self.batch_size

    def next(self) -> Tensor:
        start = self.advance()
        return self.data[start : start + self.batch_size]


def loss_sum(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum"
    )


@torch.no_grad()
def bits_per_byte(model: nn.Module, docs: list[np.ndarray], n_bytes: int) -> float:
    """Bits per byte of text, special tokens included in the numerator and not in the bytes."""
    total = sum(float(loss_sum(model, batch)) for batch in windows(docs).split(16))
    return total / math.log(2) / n_bytes


def ngram_bits_per_byte(train: bytes, heldout: bytes, order: int = 5) -> float:
    """An order-5 byte model with Witten-Bell back-off, counted on `train`."""
    probability = np.full(len(heldout), 1 / 256)
    seen, new = np.frombuffer(train, np.uint8), np.frombuffer(heldout, np.uint8)

    def keys(data: np.ndarray, length: int) -> np.ndarray:
        out = np.zeros(len(data), np.int64)
        for back in range(length, -1, -1):
            out = out * 257 + np.concatenate(
                [np.zeros(back, np.int64), data[: len(data) - back] + 1]
            )
        return out

    def lookup(table: np.ndarray, counts: np.ndarray, query: np.ndarray) -> np.ndarray:
        at = np.minimum(np.searchsorted(table, query), len(table) - 1)
        return np.where(table[at] == query, counts[at], 0)

    seen, new = seen.astype(np.int64), new.astype(np.int64)
    for n in range(order + 1):
        pairs, pair_counts = np.unique(keys(seen, n), return_counts=True)
        contexts, kinds = np.unique(pairs // 257, return_counts=True)
        totals = np.add.reduceat(pair_counts, np.searchsorted(pairs // 257, contexts))
        query = keys(new, n)
        count = lookup(pairs, pair_counts, query)
        total = lookup(contexts, totals, query // 257)
        kind = lookup(contexts, kinds, query // 257)
        mixed = (count + kind * probability) / np.maximum(total + kind, 1)
        probability = np.where(total > 0, mixed, probability)
    return float(-np.log2(probability).mean())


def optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=lr, momentum=0.95, weight_decay=0.02),
        torch.optim.AdamW(others, lr=lr * 0.2, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the shipped files")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and log")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=16, help="windows of 256 tokens per step")
    parser.add_argument(
        "--lr", type=float, default=0.02, help="Muon's; AdamW runs at a fifth of it"
    )
    parser.add_argument("--export-only", action="store_true", help="write the last checkpoint")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    library, everything = documents("train"), documents("train", tests=True)
    heldout = documents("heldout")
    tokenizer_file = args.work / "tokenizer.json"
    if tokenizer_file.exists():
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    else:
        tokenizer = train_tokenizer(library)
        tokenizer.save(str(tokenizer_file))
    shipped = set(library)
    extra = tuple(text for text in everything if text not in shipped)
    train_docs = encode(tokenizer, library) * LIBRARY_COPIES + encode(tokenizer, extra)
    heldout_docs = encode(tokenizer, heldout)
    heldout_bytes = sum(len(text.encode()) for text in heldout)
    print(
        f"{sum(map(len, train_docs)):,} training tokens an epoch, {heldout_bytes:,} held-out bytes"
    )

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=16,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        attn_implementation="eager",  # faster than the fused kernel's backward on a CPU
    )
    model = LlamaForCausalLM(config)
    opts = optimizers(model, args.lr)
    checkpoint = args.work / "checkpoint.pt"
    step = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
        step = state["step"]
        print(f"resumed at step {step}")

    if not args.export_only:
        train(model, opts, train_docs, heldout_docs[:8], step, args)
    export(model, tokenizer, args, heldout_docs, heldout, library)


def train(
    model: nn.Module,
    opts: list[torch.optim.Optimizer],
    docs: list[np.ndarray],
    probe_docs: list[np.ndarray],
    step: int,
    args: argparse.Namespace,
) -> None:
    batches = Batches(docs, args.batch_size, start=step)
    compiled = torch.compile(model)
    warmup, decay = 100, int(0.4 * args.steps)
    base = [[args.lr], [args.lr * 0.2]]
    since, seen, running = time.time(), 0, 0.0
    while step < args.steps:
        scale = min(1.0, (step + 1) / warmup, (args.steps - step) / decay)
        for opt, rates in zip(opts, base, strict=True):
            for group, rate in zip(opt.param_groups, rates, strict=True):
                group["lr"] = rate * scale
        batch = batches.next()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_sum(compiled, batch) / (batch.numel() - len(batch))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        step += 1
        seen += batch.numel()
        running += loss.item()
        if step % 50 == 0:
            record = {
                "step": step,
                "loss": running / 50,
                "tokens_per_second": round(seen / (time.time() - since)),
                "lr": args.lr * scale,
            }
            if step % 500 == 0:
                with torch.autocast("cpu", torch.bfloat16):
                    probe = windows(probe_docs)
                    total = sum(float(loss_sum(model, b).detach()) for b in probe.split(16))
                record["heldout_probe_loss"] = total / (probe.numel() - len(probe))
            print(json.dumps(record), flush=True)
            with (args.work / "log.jsonl").open("a") as log:
                log.write(json.dumps(record) + "\n")
            since, seen, running = time.time(), 0, 0.0
        if step % 250 == 0 or step == args.steps:
            part = args.work / "checkpoint.pt.part"
            state = {
                "model": model.state_dict(),
                "optimizers": [opt.state_dict() for opt in opts],
                "step": step,
            }
            torch.save(state, part)
            part.replace(args.work / "checkpoint.pt")


def export(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    args: argparse.Namespace,
    heldout_docs: list[np.ndarray],
    heldout: tuple[str, ...],
    library: tuple[str, ...],
) -> None:
    model = model.to(torch.bfloat16).float()
    text, corpus = "".join(heldout).encode(), "".join(library).encode()
    info = {
        "corpus": "Python standard library, split by module (sae_lens_route.data.demo_corpus)",
        "heldout_bytes": len(text),
        "heldout_tokens": sum(map(len, heldout_docs)),
        "bits_per_byte": round(bits_per_byte(model, heldout_docs, len(text)), 4),
        "bits_per_byte_ngram_order5": round(ngram_bits_per_byte(corpus, text), 4),
        "bits_per_byte_xz": round(len(lzma.compress(text, preset=9)) * 8 / len(text), 4),
        "steps": torch.load(args.work / "checkpoint.pt", weights_only=True)["step"],
        "tokens_per_step": args.batch_size * CONTEXT,
        "parameters": sum(p.numel() for p in model.parameters()),
        "torch": torch.__version__,
    }
    model.to(torch.bfloat16).save_pretrained(args.out)
    config_file = args.out / "config.json"
    config = json.loads(config_file.read_text())
    # the file holds bfloat16 to be small; the model is meant to run in float32. A top-level
    # rope_theta is what transformers 4 reads.
    config |= {"rope_theta": 10000.0, "dtype": "float32", "torch_dtype": "float32"}
    config_file.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, model_max_length=CONTEXT
    ).save_pretrained(args.out)
    settings_file = args.out / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings_file.write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n")
    (args.out / "INFO.json").write_text(json.dumps(info, indent=1) + "\n")
    print(json.dumps(info, indent=1))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
