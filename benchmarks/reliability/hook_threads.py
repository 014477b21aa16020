"""Trials of `hook_stress.py` in several threads at once."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from hook_passes import Planned, failing
from hook_scene import LAST, N_BLOCKS, NAME, Scene, Steps, Text, Verdicts, edit, edit_hook, run
from torch import Tensor

from sae_lens_route.errors import UserError
from sae_lens_route.splice import attach

N_THREADS, N_CALLS = 3, 3


def in_threads(work: Callable[[int], None]) -> None:
    """Run `work(i)` in threads; an exception that it does not count is a bug."""
    errors: list[BaseException] = []

    def guarded(i: int) -> None:
        try:
            with torch.no_grad():
                work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=partial(guarded, i)) for i in range(N_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def shared(scene: Scene, rng: random.Random, counts: Verdicts) -> None:
    """Passes of threads with one function or SAE for all: they are right, and none is refused."""
    about = f"shared/{scene.kind} "
    what_stays = ["nothing", "a function", *(["an SAE"] if scene.kind != "proxy" else [])]
    there: str = rng.choice(what_stays)
    seeds = [rng.randrange(2**32) for _ in range(N_THREADS)]
    with attach(scene.model, scene.sae) as hook:
        if there == "a function":
            scene.model.add_hook(NAME, edit_hook)
        elif there == "an SAE":
            scene.model.add_sae(scene.sae)

        def work(i: int) -> None:
            mine = random.Random(seeds[i])
            for _ in range(N_CALLS):
                text = mine.choice(scene.texts)
                results = {"nothing": text.clean, "a function": text.edited}
                expected = results.get(there, text.with_sae)
                what = mine.choice(["pass", "cached", "failing"])
                if what == "failing":
                    block = mine.randrange(N_BLOCKS)
                    try:
                        with failing(scene, block, 1, mine.random() < 0.5):
                            run(scene.model, text.tokens)
                    except Planned:
                        counts[about + "ended early"] += 1
                elif what == "cached":
                    counts.check(about + what, cached(scene, text), expected)
                else:
                    counts.check(about + what, run(scene.model, text.tokens), expected)
                    assert hook.routing is not None
                    counts.check(about + "routing", hook.routing.x_route, text.x_route)

        in_threads(work)


def cached(scene: Scene, text: Text) -> Tensor:
    """Logits, two tokens at a time."""
    steps = Steps(scene, len(text.tokens))
    return torch.cat([steps.step(tokens) for tokens in text.tokens.split(2, dim=1)], 1)


def turns(scene: Scene, rng: random.Random, counts: Verdicts) -> None:
    """Threads that do anything, one at a time: all results are right, and none is refused."""
    at_random(scene, rng, counts, "turns", threading.Lock())


def threads(scene: Scene, rng: random.Random, counts: Verdicts) -> None:
    """Threads that do anything at any time: right or refused, and the model as it was."""
    if rng.random() < 0.25:
        attaching(scene, rng, counts)
    else:
        at_random(scene, rng, counts, "threads", nullcontext())


def at_random(
    scene: Scene, rng: random.Random, counts: Verdicts, family: str, turn: AbstractContextManager
) -> None:
    about = f"{family}/{scene.kind} "
    seeds = [rng.randrange(2**32) for _ in range(N_THREADS)]
    allowed = () if family == "turns" else (UserError,)
    names = list(scene.model.hook_dict)
    with attach(scene.model, scene.sae):
        attached_names = list(scene.model.hook_dict)

        def work(i: int) -> None:
            mine = random.Random(seeds[i])
            for _ in range(N_CALLS):
                text = mine.choice(scene.texts)
                what = mine.choice(ACTIONS[scene.kind])
                with counts.refusing(about + what, *allowed), turn:
                    act(scene, text, what, counts, about)

        in_threads(work)
        assert list(scene.model.hook_dict) == attached_names
        text = rng.choice(scene.texts)
        counts.check(about + "afterwards", run(scene.model, text.tokens), text.clean)
        act(scene, text, "edit", counts, about + "afterwards, ")
    assert list(scene.model.hook_dict) == names


def attaching(scene: Scene, rng: random.Random, counts: Verdicts) -> None:
    """One thread attaches and removes while the others run passes."""
    about = f"threads/{scene.kind} "
    texts = [[rng.choice(scene.texts) for _ in range(N_CALLS)] for _ in range(N_THREADS)]

    def work(i: int) -> None:
        what = "attach" if i == 0 else "clean"
        for text in texts[i]:
            # RuntimeError: the hook was attached or removed within the pass
            with counts.refusing(f"{about}{what} while attaching", UserError, RuntimeError):
                act(scene, text, what, counts, about)

    in_threads(work)
    text = rng.choice(scene.texts)
    counts.check(about + "afterwards", run(scene.model, text.tokens), text.clean)


OF_ALL = ["clean", "cached", "read", "edit", "edit by filter", "edit within hooks()", "block 0"]
OF_SAE_MODELS = ["sae", "sae read", "stop"]
ACTIONS = {
    "hooked": [*OF_ALL, *OF_SAE_MODELS],
    "bridge": [*OF_ALL, *OF_SAE_MODELS],
    "proxy": OF_ALL,
}


def act(scene: Scene, text: Text, what: str, counts: Verdicts, about: str) -> None:
    """One thing that a thread does with a model, and its check; exceptions are the caller's."""
    model, tokens = scene.model, text.tokens

    def right(actual: Tensor, expected: Tensor) -> None:
        counts.check(about + what, actual, expected)

    if what == "clean":
        right(run(model, tokens), text.clean)
    elif what == "cached":
        right(cached(scene, text), text.clean)
    elif what == "read":
        _, cache = model.run_with_cache(tokens, names_filter=[NAME])
        right(cache[NAME], text.x_route)
    elif what == "edit":
        right(model.run_with_hooks(tokens, fwd_hooks=[(NAME, edit_hook)]), text.edited)
    elif what == "edit by filter":
        hooks: list[Any] = [(lambda name: name == NAME, edit_hook)]
        right(model.run_with_hooks(tokens, fwd_hooks=hooks), text.edited)
    elif what == "edit within hooks()":
        with model.hooks(fwd_hooks=[(NAME, edit_hook)]):
            right(run(model, tokens), text.edited)
    elif what == "block 0":
        hooks = [(scene.block_0, lambda value, hook: edit(value))]
        right(model.run_with_hooks(tokens, fwd_hooks=hooks), text.edited_at_block_0)
    elif what == "sae":
        right(model.run_with_saes(tokens, saes=[scene.sae]), text.with_sae)
    elif what == "sae read":
        logits, cache = model.run_with_cache_with_saes(tokens, saes=[scene.sae])
        right(logits, text.with_sae)
        assert f"{NAME}.hook_sae_acts_post" in cache
    elif what == "stop":
        right(model(tokens, stop_at_layer=LAST), text.streams[LAST - 1])
    else:
        with attach(model, scene.sae):
            right(run(model, tokens), text.clean)
            time.sleep(0.001)
