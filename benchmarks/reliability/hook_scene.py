"""What `hook_stress.py` stresses: a small model of each kind, and the right results of a few texts.

"Right" means that the result agrees with brute force to 1e-9 in float64, where a wrong stream is
off by more than 1e-2. Brute force are two passes with plain hooks (`tests/support/splice.py`), made
beforehand on a copy of the model that nothing else touches.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sae_lens.analysis.compat import has_transformer_bridge
from sae_lens.load_model import HookedProxyLM
from torch import Tensor
from transformers import DynamicCache

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from support.splice import (
    KeyValueCache,
    brute_force,
    clean_streams,
    hf_model,
    hooked_model,
    route_sae,
    run,
    some_tokens,
    tokenizer,
    with_hooks,
)

from sae_lens_route.models.kinds import (
    decoder_blocks,
    residual_hook_names,
    residual_of,
    with_residual,
)

N_BLOCKS = 7
ROUTED = [1, 2, 4]
FIRST, LAST = ROUTED[0], ROUTED[-1]
NAME = f"blocks.{LAST}.route.hook_resid_post"
SHAPES = [(1, 5), (2, 7), (3, 4), (2, 5), (1, 9), (4, 3)]
TOLERANCE = 1e-9


class Verdicts(Counter[str]):
    """How often each thing happened, by `family/kind what: verdict`."""

    def check(self, about: str, actual: Tensor, expected: Tensor) -> None:
        right = actual.shape == expected.shape and bool(
            ((actual - expected).abs() <= TOLERANCE * (1 + expected.abs())).all()
        )
        self[f"{about}: {'right' if right else 'WRONG'}"] += 1

    @contextmanager
    def refusing(self, about: str, *allowed: type[BaseException]) -> Iterator[None]:
        """Count exceptions of the kinds allowed, by message."""
        try:
            yield
        except allowed as error:
            text = str(error).split(". ")[0].split(": ")[0].replace(repr(NAME), "the hook point")
            self[f"{about}: refused, {type(error).__name__}: {text}"] += 1


# --- models and edits ----------------------------------------------------------------------------


def edit(value: Tensor) -> Tensor:
    """What the hook functions do: it couples no tokens and changes all."""
    return value.tanh() + torch.linspace(-1, 1, value.shape[-1], dtype=value.dtype)


def edit_hook(value: Tensor, hook: Any) -> Tensor:
    return edit(value)


def bridge() -> Any:
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    with tempfile.TemporaryDirectory() as folder:
        hf_model("llama", N_BLOCKS).save_pretrained(folder)
        return SAETransformerBridge.boot_transformers(
            folder, dtype=torch.float64, tokenizer=tokenizer()
        )


KINDS: dict[str, Callable[[], Any]] = {
    "hooked": lambda: hooked_model("gpt2", n_layers=N_BLOCKS),
    "proxy": lambda: HookedProxyLM(hf_model("llama", N_BLOCKS), tokenizer()),
}
if has_transformer_bridge():
    KINDS["bridge"] = bridge


class Text:
    """A batch of tokens with its results, by brute force."""

    def __init__(self, model: Any, sae: Any, shape: tuple[int, int], seed: int) -> None:
        self.tokens = some_tokens(*shape, seed=seed)

        def run_model() -> Tensor:
            return run(model, self.tokens)

        def spliced(f: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
            logits, _, x_route = brute_force(model, sae, ROUTED, f, run_model)
            return logits, x_route

        def edit_block_0(i: int) -> Callable[..., Any]:
            return lambda block, args, output: (
                with_residual(output, edit(residual_of(output))) if i == 0 else None
            )

        blocks = decoder_blocks(model)
        self.clean, self.streams = clean_streams(blocks, range(N_BLOCKS), run_model)
        _, self.x_route = spliced(lambda value: value)
        self.edited, _ = spliced(edit)
        self.with_sae, _ = spliced(lambda value: sae.decode(sae.encode(value)))
        self.edited_at_block_0 = with_hooks(blocks, edit_block_0, run_model)
        for other in (self.edited, self.with_sae, self.edited_at_block_0):
            assert (other - self.clean).abs().max() > 1e-2


class Scene:
    """A model whose hook is to be stressed, and texts whose results are known."""

    def __init__(self, kind: str) -> None:
        self.kind, self.model, self.sae = kind, KINDS[kind](), route_sae(ROUTED)
        untouched = KINDS[kind]()
        self.texts = [Text(untouched, self.sae, s, i) for i, s in enumerate(SHAPES)]
        self.is_hooked = kind == "hooked"
        self.block_0 = residual_hook_names(self.model, [0])[0]

    @property
    def blocks(self) -> list[Any]:
        return decoder_blocks(self.model)


class Steps:
    """Steps of a generation with one cache."""

    def __init__(self, scene: Scene, batch: int) -> None:
        self._model, self._is_hooked = scene.model, scene.is_hooked
        if scene.is_hooked:
            self._cache: Any = KeyValueCache.init_cache(scene.model.cfg, "cpu", batch)
        else:
            self._cache = DynamicCache()

    def step(self, tokens: Tensor) -> Tensor:
        """Logits of the next tokens."""
        if self._is_hooked:
            mask = torch.ones_like(tokens)
            return self._model(tokens, past_kv_cache=self._cache, attention_mask=mask)
        kwargs = {"past_key_values": self._cache, "use_cache": True}
        if isinstance(self._model, HookedProxyLM):
            return self._model.model(tokens, **kwargs).logits
        return self._model(tokens, return_type="logits", **kwargs)
