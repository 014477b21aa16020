"""Replaying a block's call, with its entry of the key-value cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import cache_utils

from sae_lens_route.errors import UserError


class BlockCall:
    """A block's arguments without the residual stream, and its key-value cache entry, if any.

    TransformerLens and Hugging Face grow an entry by binding new tensors to its attributes, so
    storing the attributes is enough to roll it back.
    """

    def __init__(self, args: tuple, kwargs: dict[str, Any], index: int) -> None:
        """Begin the clean half: a clean twin, if there is one, replaces the entry's state."""
        # without the residual stream, which is the first argument or passed by name
        self._args = args[1:]
        self._kwargs = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        # TransformerLens moves the stream from one GPU to the next between blocks
        self._device = (args[0] if args else kwargs["hidden_states"]).device
        self.entry = _cache_entry((*args, *kwargs.values()), index)
        self._before = self._clean = _state(self.entry)
        self._require_finished()
        twin: _Twin | None = getattr(self.entry, _TWIN, None)
        self.has_twin = twin is not None
        if twin is not None:
            if any(self._before.get(name) is not value for name, value in twin.edited.items()):
                raise RuntimeError(
                    "the key-value cache was cropped, reordered or grown by something else while "
                    "it held edits (beam search does this): use a new cache, or none"
                )
            vars(self.entry).update(twin.clean)

    def _require_finished(self) -> None:
        """Refuse an entry that a pass that ended early has changed; mark it as in use."""
        if self.entry is None:
            return
        begun: dict[str, Any] | None = getattr(self.entry, _BEGUN, None)
        if begun is not None and any(self._before.get(n) is not v for n, v in begun.items()):
            raise RuntimeError(
                "the last pass with this key-value cache ended early, and only some blocks have "
                "written to it: use a new cache"
            )
        setattr(self.entry, _BEGUN, self._before)

    def end_clean_half(self) -> None:
        self._clean = _state(self.entry)

    def replay(self, block: nn.Module, stream: Tensor) -> Any:
        """Run the block on another stream; the cache is rolled back to before the clean half."""
        if self.entry is not None:
            _require_growing(self.entry)
            vars(self.entry).update(self._before)
        output = block(stream.to(self._device), *self._args, **self._kwargs)
        if self.entry is not None:
            setattr(self.entry, _TWIN, _Twin(clean=self._clean, edited=_state(self.entry)))
        return output


def end_use(entry: Any) -> None:
    """All blocks have written to the cache that this entry is of."""
    vars(entry).pop(_BEGUN, None)


_TWIN = "_route_clean_twin"
_BEGUN = "_route_begun"  # the entry's state before a call of the model that has not ended


@dataclass
class _Twin:
    """Stored on a cache entry: its state in the clean model, and its edited state at that time."""

    clean: dict[str, Any]
    edited: dict[str, Any]


def _cache_entry(inputs: tuple, index: int) -> Any:
    """Block `index`'s cache entry among its arguments, or None without a cache."""
    for value in inputs:
        if hasattr(value, "past_keys"):  # TransformerLens passes each block its entry
            return value
        if isinstance(value, cache_utils.Cache):
            layers = getattr(value, "layers", None)
            if layers is None:
                return value
            new_layer: Callable[[], Any] | None = getattr(value, "layer_class_to_replicate", None)
            while new_layer is not None and len(layers) <= index:
                layers.append(new_layer())  # as the cache would when the block runs
            return layers[index] if index < len(layers) else None
    return None


def _state(entry: Any) -> dict[str, Any]:
    """All attributes of an entry except `frozen`, which its user may switch at any time."""
    attributes = {} if entry is None else vars(entry)
    return {name: v for name, v in attributes.items() if name not in (_TWIN, _BEGUN, "frozen")}


def _require_growing(entry: Any) -> None:
    growing = getattr(cache_utils, "DynamicLayer", ())
    is_growing = isinstance(entry, growing) and not hasattr(entry, "conv_states")
    if not (is_growing or hasattr(entry, "past_keys")):
        raise UserError(
            f"edits at a routed hook cannot be kept in a {type(entry).__name__}, which is written "
            "in place: use a DynamicCache (transformers >= 4.54) or use_cache=False"
        )
