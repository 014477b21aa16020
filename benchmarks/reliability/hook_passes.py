"""Trials of `hook_stress.py` in one thread: passes that end early, and blocks in other orders."""

from __future__ import annotations

import itertools
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from hook_scene import (
    FIRST,
    LAST,
    N_BLOCKS,
    NAME,
    Scene,
    Steps,
    Text,
    Verdicts,
    edit_hook,
    run,
)

from sae_lens_route.splice import attach


class Planned(Exception):
    """The exception that ends a pass early."""


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


# --- passes that end early -----------------------------------------------------------------------


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
            scene.model.add_hook(NAME, edit_hook)
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


# --- other orders --------------------------------------------------------------------------------


def order(scene: Scene, rng: random.Random, counts: Verdicts) -> None:
    """Blocks in another order, and calls of the model or of a block within a hook."""
    first, second = rng.sample(scene.texts, 2)
    of_hooked = ["by hand inside", "repeated", "skipped"] if scene.is_hooked else []
    what = rng.choice(["nested", *of_hooked])
    about = f"order/{scene.kind} {what}"
    with attach(scene.model, scene.sae) as hook:
        scene.model.add_hook(NAME, edit_hook)
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
