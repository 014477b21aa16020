"""The routed hook under stress: every result is right or refused, never silently wrong.

Four families of faults, each trial drawn at random; "right" means that the logits agree with brute
force (two passes with plain hooks, computed beforehand on an untouched copy of the model) to 1e-9
in float64, where a wrong stream is off by more than 1e-2.

    early     a pass ends early (an exception in a block, in the hook function or in the replay,
              `stop_at_layer`, a KeyboardInterrupt at any instant); then comes an ordinary pass of
              another shape, a pass or single blocks that start in the middle, or the rest of a
              cached generation
    order     blocks repeated, skipped, called by hand, and calls of the model inside a hook
    shared    several threads run plain passes, cached passes and passes that fail, with one hook
              function for all of them: none may be refused
    threads   several threads read, edit, splice an SAE in, attach and remove at random

"Ignored" are edits that never came to the hook point: `run_with_hooks` of a TransformerBridge skips
names that it does not know without a word, among them that of a hook point whose place the SAE of
another thread has taken.

    python benchmarks/reliability/hook_stress.py --n 2000
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformer_lens
from sae_lens import HookedSAETransformer
from sae_lens.analysis.compat import has_transformer_bridge
from sae_lens.load_model import HookedProxyLM
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor
from transformer_lens import HookedTransformerConfig
from transformers import AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM

from sae_lens_route.models.kinds import decoder_blocks, residual_of, with_residual
from sae_lens_route.models.names import DEMO_FOLDER
from sae_lens_route.saes import RouteTopKSAE, RouteTopKSAEConfig
from sae_lens_route.splice import attach

RESULTS = Path(__file__).parents[1] / "results" / "reliability" / "hook_stress.json"
N_BLOCKS, WIDTH, VOCAB = 7, 16, 64
ROUTED = [1, 2, 4]
FIRST, LAST = ROUTED[0], ROUTED[-1]
NAME = f"blocks.{LAST}.route.hook_resid_post"
SHAPES = [(1, 5), (2, 7), (3, 4), (2, 5), (1, 9), (4, 3)]
TOLERANCE = 1e-9
KeyValueCache = getattr(transformer_lens, "HookedTransformerKeyValueCache", None) or (
    transformer_lens.TransformerLensKeyValueCache
)


class Planned(Exception):
    """The exception that ends a pass early."""


class Verdicts(Counter[str]):
    """How often each thing happened, by `family/kind: what`."""

    total_refused = 0

    def check(self, about: str, actual: Tensor, expected: Tensor) -> None:
        right = actual.shape == expected.shape and bool(
            ((actual - expected).abs() <= TOLERANCE * (1 + expected.abs())).all()
        )
        self[f"{about}: {'right' if right else 'WRONG'}"] += 1

    @contextmanager
    def refusing(self, about: str, *allowed: type[BaseException]) -> Iterator[None]:
        """Count exceptions of the kinds allowed, by message; an interruption is a trial, too."""
        try:
            yield
        except allowed as error:
            text = str(error).split(":")[0].split(" at 'blocks")[0][:60]
            self[f"{about}: refused, {type(error).__name__} {text}"] += 1
            self.total_refused += 1


# --- models and brute force ----------------------------------------------------------------------


def edit(value: Tensor) -> Tensor:
    """What the hook function does: it couples no tokens and changes all."""
    return value.tanh() + torch.linspace(-1, 1, value.shape[-1], dtype=value.dtype)


def edit_hook(value: Tensor, hook: Any) -> Tensor:
    return edit(value)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    cfg = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=N_BLOCKS,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(cfg).double().eval().requires_grad_(False)


def hooked() -> Any:
    cfg = HookedTransformerConfig(
        n_layers=N_BLOCKS,
        d_model=WIDTH,
        n_ctx=64,
        n_heads=2,
        d_head=WIDTH // 2,
        d_vocab=VOCAB,
        act_fn="gelu_new",
        normalization_type="LN",
        dtype=torch.float64,
        seed=0,
    )
    return HookedSAETransformer(cfg).eval().requires_grad_(False)


def bridge() -> Any:
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    with tempfile.TemporaryDirectory() as folder:
        llama().save_pretrained(folder)
        model = SAETransformerBridge.boot_transformers(
            folder, dtype=torch.float64, tokenizer=AutoTokenizer.from_pretrained(DEMO_FOLDER)
        )
    return model.eval().requires_grad_(False)


KINDS: dict[str, Callable[[], Any]] = {
    "hooked": hooked,
    "proxy": lambda: HookedProxyLM(llama(), None),  # type: ignore[arg-type]
}
if has_transformer_bridge():
    KINDS["bridge"] = bridge


def route_sae() -> RouteTopKSAE:
    torch.manual_seed(0)
    metadata = SAEMetadata(
        hook_name=NAME, hook_names=[f"blocks.{b}.hook_resid_post" for b in ROUTED]
    )
    cfg = RouteTopKSAEConfig(
        d_in=WIDTH, d_sae=64, k=8, n_routed_layers=3, dtype="float64", metadata=metadata
    )
    sae = RouteTopKSAE(cfg).requires_grad_(False)
    for parameter in sae.parameters():
        parameter.normal_()
    sae.W_enc.div_(WIDTH**0.5)
    sae.W_router.div_(10)
    return sae


def run(model: Any, tokens: Tensor) -> Tensor:
    if isinstance(model, HookedProxyLM):
        return model.model(tokens).logits
    return model(tokens, return_type="logits")


@contextmanager
def hooks(model: Any, make: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    handles = [b.register_forward_hook(make(i)) for i, b in enumerate(decoder_blocks(model))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def normalized(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean, scale = x.mean(-1, keepdim=True), x.std(-1, keepdim=True) + 1e-6
    return (x - mean) / scale, mean, scale


class Text:
    """A batch of tokens with its logits, by brute force."""

    def __init__(self, model: Any, sae: RouteTopKSAE, shape: tuple[int, int], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(VOCAB, shape, generator=generator)
        streams: dict[int, Tensor] = {}

        def keep(i: int) -> Callable[..., None]:
            return lambda block, args, output: streams.__setitem__(i, residual_of(output).clone())

        with hooks(model, keep):
            self.clean = run(model, self.tokens)
        self.streams = streams
        normed = torch.stack([normalized(streams[b])[0] for b in ROUTED], -2)
        p = torch.softmax(normed.sum(-2) @ sae.W_router, -1)
        self.weight, self.route = p.max(-1)
        index = self.route[..., None, None].expand(*shape, 1, WIDTH)
        self.x_route = self.weight.unsqueeze(-1) * normed.gather(-2, index).squeeze(-2)
        self.edited = self._spliced(model, edit)
        self.with_sae = self._spliced(model, lambda value: sae.decode(sae.encode(value)))
        assert (self.edited - self.clean).abs().max() > 1e-2
        assert (self.with_sae - self.clean).abs().max() > 1e-2

    def _spliced(self, model: Any, f: Callable[[Tensor], Tensor]) -> Tensor:
        weight = self.weight.unsqueeze(-1)

        def write(i: int) -> Callable[..., Any]:
            def hook(block: Any, args: Any, output: Any) -> Any:
                if i not in ROUTED:
                    return None
                normed, mean, scale = normalized(residual_of(output))
                new = f(weight * normed) / weight * scale + mean
                here = (self.route == ROUTED.index(i)).unsqueeze(-1)
                return with_residual(output, torch.where(here, new, residual_of(output)))

            return hook

        with hooks(model, write):
            return run(model, self.tokens)


class Scene:
    """A model, the hook to be stressed, and texts whose results are known."""

    def __init__(self, kind: str) -> None:
        self.kind, self.model, self.sae = kind, KINDS[kind](), route_sae()
        untouched = KINDS[kind]()
        self.texts = [Text(untouched, self.sae, s, i) for i, s in enumerate(SHAPES)]
        self.is_hooked = kind == "hooked"

    @property
    def blocks(self) -> list[Any]:
        return decoder_blocks(self.model)


# --- one family each -----------------------------------------------------------------------------


@contextmanager
def failing(scene: Scene, block: int, calls: int, inside: bool) -> Iterator[None]:
    """The block raises when it is called for the n-th time by this thread: 2 is the replay."""
    thread, n = threading.get_ident(), 0

    def fail(module: Any, *_: Any) -> None:
        nonlocal n
        if threading.get_ident() == thread:
            n += 1
            if n == calls:
                raise Planned

    place = scene.blocks[block]
    if inside:
        handle = next(place.children()).register_forward_hook(fail)
    else:
        handle = place.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def interrupted(seconds: float) -> Iterator[None]:
    """A KeyboardInterrupt after this time, wherever the program is then."""
    armed = True

    def interrupt(*_: Any) -> None:
        if armed:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def end_early(scene: Scene, text: Text, rng: random.Random, counts: Verdicts) -> None:
    """Begin a pass of `text` that does not end, in one of several ways."""
    ways = ["block", "inside", "hook", "interrupt", *(["stop"] if scene.kind != "proxy" else [])]
    way, n_calls = rng.choice(ways), 1
    about = f"early/{scene.kind} ended by {way}"
    try:
        if way in ("block", "inside"):
            block = rng.randrange(N_BLOCKS)
            n_calls = rng.choice([1, 2]) if FIRST < block <= LAST else 1
            with failing(scene, block, n_calls, way == "inside"):
                run(scene.model, text.tokens)
        elif way == "hook":
            with failing_hook(scene, rng.choice([1, 2])):
                run(scene.model, text.tokens)
        elif way == "stop":
            scene.model(text.tokens, stop_at_layer=rng.randrange(1, LAST + 1))
        else:
            with interrupted(rng.uniform(1e-4, 8e-3)):
                run(scene.model, text.tokens)
        counts[about + ", returned"] += 1
    except (Planned, KeyboardInterrupt):
        counts[about] += 1


@contextmanager
def failing_hook(scene: Scene, calls: int) -> Iterator[None]:
    """A function at the routed hook point that raises when it is called for the n-th time."""
    n = 0

    def fail(*_: Any) -> None:
        nonlocal n
        n += 1
        if n == calls:
            raise Planned

    handle = scene.model.hook_dict[NAME].register_forward_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def early(scene: Scene, rng: random.Random, counts: Verdicts) -> None:
    """A pass that ends early, then what must not see anything of it."""
    first, second = rng.sample(scene.texts, 2)
    about = f"early/{scene.kind} "
    edits = rng.random() < 0.7
    with attach(scene.model, scene.sae) as hook:
        if edits:
            scene.model.hook_dict[NAME].add_hook(edit_hook)
        if rng.random() < 0.4:
            early_in_a_cache(scene, rng, counts, second, edits)
            return
        for _ in range(rng.choice([1, 1, 2, 3])):
            end_early(scene, first, rng, counts)
        for _ in range(2):
            after = rng.choice(["pass", "middle", "hand"])
            if after == "middle" and scene.is_hooked:
                start = rng.randrange(FIRST + 1, LAST + 1)
                with counts.refusing(about + "then start_at_layer", RuntimeError):
                    scene.model(second.streams[start - 1], start_at_layer=start)
                    counts[about + "then start_at_layer: WRONG"] += 1
            elif after == "hand" and scene.is_hooked:
                with counts.refusing(about + "then blocks by hand", RuntimeError):
                    start = rng.randrange(FIRST + 1, LAST + 1)
                    x = second.streams[start - 1].clone()
                    for block in scene.blocks[start:]:
                        x = block(x)
                    counts[about + "then blocks by hand: WRONG"] += 1
            logits = run(scene.model, second.tokens)
            counts.check(about + "then a pass", logits, second.edited if edits else second.clean)
            assert hook.routing is not None
            counts.check(about + "then routing", hook.routing.x_route, second.x_route)


class Steps:
    """Steps of a generation with one cache."""

    def __init__(self, scene: Scene, batch: int) -> None:
        self.scene, self.model = scene, scene.model
        if scene.is_hooked:
            self.cache: Any = KeyValueCache.init_cache(scene.model.cfg, "cpu", batch)
        else:
            self.cache = DynamicCache()

    def step(self, tokens: Tensor) -> Tensor:
        if self.scene.is_hooked:
            mask = torch.ones_like(tokens)
            return self.model(tokens, past_kv_cache=self.cache, attention_mask=mask)
        kwargs = {"past_key_values": self.cache, "use_cache": True}
        if isinstance(self.model, HookedProxyLM):
            return self.model.model(tokens, **kwargs).logits
        return self.model(tokens, return_type="logits", **kwargs)


def early_in_a_cache(
    scene: Scene, rng: random.Random, counts: Verdicts, text: Text, edits: bool
) -> None:
    """A step of a cached generation fails at a routed block; its repetition is right or refused."""
    about = f"early/{scene.kind} cached "
    steps, done = Steps(scene, len(text.tokens)), 0
    expected = text.edited if edits else text.clean
    n = text.tokens.shape[1]
    cuts = [0, *sorted(rng.sample(range(1, n), min(2, n - 1))), n]
    fails_at = rng.randrange(len(cuts) - 1)
    for i, (start, end) in enumerate(itertools.pairwise(cuts)):
        if i == fails_at:
            block, calls = rng.randrange(FIRST + 1, N_BLOCKS), 1
            if block <= LAST and edits:
                calls = rng.choice([1, 2])
            try:
                with failing(scene, block, calls, rng.random() < 0.5):
                    steps.step(text.tokens[:, start:end])
            except Planned:
                counts[about + "ended early"] += 1
        with counts.refusing(about + "again", RuntimeError):
            logits = steps.step(text.tokens[:, start:end])
            counts.check(about + "again", logits, expected[:, start:end])
            done = end
        if done != end:
            return


def order(scene: Scene, rng: random.Random, counts: Verdicts) -> None:
    """Blocks in another order, and calls of the model or of a block within a hook."""
    first, second = rng.sample(scene.texts, 2)
    of_hooked = ["by hand inside", "repeated", "skipped"] if scene.is_hooked else []
    what = rng.choice(["nested", *of_hooked])
    about = f"order/{scene.kind} {what}"
    with attach(scene.model, scene.sae) as hook:
        scene.model.hook_dict[NAME].add_hook(edit_hook)
        block = rng.randrange(0, N_BLOCKS)
        if what in ("nested", "by hand inside"):
            busy = False

            def call(module: Any, args: Any, output: Any) -> None:
                nonlocal busy
                if busy:
                    return
                busy = True
                try:
                    if what == "nested":
                        counts.check(about, run(scene.model, second.tokens), second.edited)
                    else:
                        scene.blocks[rng.randrange(FIRST, LAST + 1)](second.streams[FIRST].clone())
                finally:
                    busy = False

            with counts.refusing(about, RuntimeError), on(scene.blocks[block], call):
                logits = run(scene.model, first.tokens)
                counts.check(about + ", outer", logits, first.edited)
                assert hook.routing is not None
                counts.check(about + ", routing", hook.routing.x_route, first.x_route)
        else:
            blocks = list(range(FIRST, LAST + 1))
            if what == "repeated":
                blocks.insert(rng.randrange(len(blocks)), rng.choice(blocks))
            else:
                blocks.remove(rng.choice(blocks[:-1]))
            kept = scene.model.blocks
            scene.model.blocks = torch.nn.ModuleList(
                [*kept[:FIRST], *(kept[i] for i in blocks), *kept[LAST + 1 :]]
            )
            try:
                with counts.refusing(about, RuntimeError):
                    run(scene.model, first.tokens)
                    counts[about + ": WRONG"] += 1
            finally:
                scene.model.blocks = kept
        counts.check(about + ", then a pass", run(scene.model, second.tokens), second.edited)


@contextmanager
def on(block: Any, hook: Callable[..., None]) -> Iterator[None]:
    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def in_threads(n: int, work: Callable[[int], None]) -> None:
    """Run `work(i)` in n threads; an exception that it does not count is a bug of this script."""
    errors: list[BaseException] = []

    def guarded(i: int) -> None:
        try:
            with torch.no_grad():
                work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=partial(guarded, i)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def shared(scene: Scene, rng: random.Random, counts: Verdicts) -> None:
    """Threads with one hook function: all results are right, none refused."""
    about = f"shared/{scene.kind} "
    edits, seeds = rng.random() < 0.7, [rng.randrange(2**32) for _ in range(3)]
    with attach(scene.model, scene.sae) as hook:
        if edits:
            scene.model.add_hook(NAME, edit_hook)

        def work(i: int) -> None:
            mine = random.Random(seeds[i])
            for _ in range(3):
                text = mine.choice(scene.texts)
                expected = text.edited if edits else text.clean
                what = mine.choice(["pass", "cached", "failing"])
                if what == "failing":
                    block = mine.randrange(N_BLOCKS)
                    try:
                        with failing(scene, block, 1, mine.random() < 0.5):
                            run(scene.model, text.tokens)
                    except Planned:
                        counts[about + "ended early"] += 1
                elif what == "cached":
                    steps = Steps(scene, len(text.tokens))
                    logits = torch.cat([steps.step(t) for t in text.tokens.split(2, dim=1)], 1)
                    counts.check(about + what, logits, expected)
                else:
                    counts.check(about + what, run(scene.model, text.tokens), expected)
                    assert hook.routing is not None
                    counts.check(about + "routing", hook.routing.x_route, text.x_route)

        in_threads(3, work)
    scene.model.reset_hooks()


def threads(scene: Scene, rng: random.Random, counts: Verdicts) -> None:
    """Threads that add and remove hooks and SAEs, attach and remove: right or refused."""
    about = f"threads/{scene.kind} "
    seeds = [rng.randrange(2**32) for _ in range(3)]
    attaching, refused = rng.random() < 0.3, counts.total_refused
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hook = None if attaching else attach(scene.model, scene.sae)

        def work(i: int) -> None:
            mine = random.Random(seeds[i])
            for _ in range(3):
                text = mine.choice(scene.texts)
                if attaching:
                    what = "attach" if i == 0 else "clean"
                else:
                    what = mine.choice(THREAD_ACTIONS[scene.kind])
                with counts.refusing(about + what, Exception):
                    act(scene, text, what, counts, about)

        in_threads(3, work)
        if hook is not None:
            hook.remove()
    if counts.total_refused > refused:
        # a race of TransformerLens or SAELens may leave their own registries in any state
        scene.model = KINDS[scene.kind]()


THREAD_ACTIONS = {
    "hooked": ["clean", "read", "edit", "sae"],
    "bridge": ["clean", "read", "edit", "sae"],
    "proxy": ["clean", "read", "edit"],
}


def act(scene: Scene, text: Text, what: str, counts: Verdicts, about: str) -> None:
    """One call of a thread, and its check; exceptions are the caller's."""
    model = scene.model
    if what == "clean":
        counts.check(about + what, run(model, text.tokens), text.clean)
    elif what == "read":
        _, cache = model.run_with_cache(text.tokens, names_filter=[NAME])
        counts.check(about + what, cache[NAME], text.x_route)
    elif what == "edit":
        edits: list[Tensor] = []

        def count(value: Tensor, hook: Any) -> Tensor:
            edits.append(edit(value))
            return edits[-1]

        logits = model.run_with_hooks(text.tokens, fwd_hooks=[(NAME, count)])
        if scene.kind == "bridge" and not edits:
            counts[f"{about}{what}: ignored"] += 1
        else:
            counts.check(about + what, logits, text.edited)
    elif what == "sae":
        counts.check(
            about + what, model.run_with_saes(text.tokens, saes=[scene.sae]), text.with_sae
        )
    else:
        with attach(model, scene.sae):
            counts.check(about + what, run(model, text.tokens), text.clean)
            time.sleep(0.001)


FAMILIES = {"early": early, "order": order, "shared": shared, "threads": threads}


@torch.no_grad()
def stress(n: int, seed: int = 0) -> Verdicts:
    """n trials of each family, spread over the kinds of model."""
    counts, rng = Verdicts(), random.Random(seed)
    for family, trial in FAMILIES.items():
        for kind in KINDS:
            scene = Scene(kind)
            for _ in range(-(-n // len(KINDS))):
                trial(scene, rng, counts)
                counts[f"{family}/{kind} trials"] += 1
    return counts


def summary(counts: Verdicts) -> dict[str, dict[str, int]]:
    """By family: trials, and results of each kind."""
    rows: dict[str, dict[str, int]] = {}
    for name, count in counts.items():
        row = rows.setdefault(name.split("/")[0], dict.fromkeys(("trials", *WHATS), 0))
        what = "trials" if name.endswith(" trials") else None
        for each in WHATS:
            if f": {each}" in name or (each == "ended early" and "ended" in name):
                what = each
        if what:
            row[what] += count
    return rows


WHATS = ("ended early", "right", "refused", "ignored", "WRONG")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The routed hook under stress.")
    parser.add_argument("--n", type=int, default=2000, help="trials of each family")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    before = time.perf_counter()
    counts = stress(options.n, options.seed)
    rows = summary(counts)
    print(f"{'family':10}" + "".join(f"{name:>13}" for name in ("trials", *WHATS)))
    for family, row in rows.items():
        print(f"{family:10}" + "".join(f"{number:13}" for number in row.values()))
    for name in sorted(counts):
        print(f"{counts[name]:7} {name}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "command": f"python benchmarks/reliability/hook_stress.py --n {options.n}",
        "versions": {name: version(name) for name in ("torch", "sae-lens", "transformer-lens")},
        "seed": options.seed,
        "seconds": round(time.perf_counter() - before),
        "families": rows,
        "counts": dict(sorted(counts.items())),
    }
    options.output.write_text(json.dumps(content, indent=1) + "\n")
    return int(any(row["WRONG"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
