"""The routed hook point: a RouteSAE in a running language model.

`attach(model, sae)` gives the model one more TransformerLens `HookPoint`, named
`sae.cfg.metadata.hook_name`. What passes through it is the routed activation `[batch, pos, d]`, so
whatever reads or edits a hook (`run_with_cache`, `run_with_hooks`, `add_sae`, `run_evals`) reads or
edits routed features. One forward pass, with i*(t) the routed block of token t:

1. *Collect.* Hooks on the blocks keep the outputs of the routed blocks, and how every block after
   the first routed one was called.
2. *Route.* After the last routed block all streams are there, and the router picks i*(t) and p(t).
   So the unedited model decides: an edited early block takes no part in its own choice. (Uniform
   routing draws anew in every pass.)
3. *Fire.* x_route goes through the hook point. If it comes back as it went in, the pass goes on,
   and nothing was computed twice.
4. *Replay.* Otherwise the blocks after the first routed one run again, called as before. What
   leaves routed block i is edited at the tokens with i*(t) = i: with f what sits at the hook and x
   the stream that is there now,

       x  <-  f(p n(x)) / p * scale + mean,       n(x) = (x - mean) / scale,  scale = std + 1e-6.

   The hook fires once per routed block that has tokens, and is given for every token the activation
   met at its own block so far: the last firing holds what was really used, for all tokens. The
   replay's result flows on instead of the clean one.
5. *Caches.* With a key-value cache the clean half must attend to clean keys and values, the replay
   to edited ones. The cache holds the edited ones; once they differ, each entry carries its clean
   twin, which takes its place during the clean half. From then on every pass is replayed.

A crosscoder reads all L streams and writes all of them. At its hook point passes the stack of the
normalised streams, `[batch, pos, L*d]`, and the steps are the same but for these. *Fire*: once a
pass, with the clean stack. *Replay*: a token whose vector came back changed gets, after each of the
L blocks, that block's part of the vector with the clean stream's scale and mean; any other token
keeps the stream that is there now. As the last of the blocks is written whole too, what was written
to a token earlier reaches the logits only through attention: through other tokens that were left as
they are (a BOS that the SAE excludes, positions outside a steering), now or later in a cache.

Gradients flow through all of it, through p and the clean half too. A backward hook at the hook
point sees one gradient per firing, zero outside the tokens of that block: the sum is the gradient.
The `hidden_states` that a Hugging Face model returns on request count replayed blocks twice.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar, overload

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import HookedSAETransformer
from sae_lens.load_model import HookedProxyLM
from sae_lens.saes.sae import SAE, TrainingSAE
from torch import Tensor, nn
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint
from transformers import cache_utils
from typing_extensions import override

from sae_lens_route.baselines import StackedSAE
from sae_lens_route.models import LanguageModel, d_model, decoder_blocks
from sae_lens_route.router import Routing, normalization_stats
from sae_lens_route.saes import RoutedSAE

AnyHook = TypeVar("AnyHook", bound="StreamsHook")


@overload
def attach(model: LanguageModel, sae: RoutedSAE, *, unscaled: bool = ...) -> RoutedHook: ...
@overload
def attach(model: LanguageModel, sae: StackedSAE) -> StackedHook: ...
def attach(
    model: LanguageModel, sae: RoutedSAE | StackedSAE, *, unscaled: bool = False
) -> RoutedHook | StackedHook:
    """Give `model` the hook point of `sae`; `.remove()`, or leaving a `with`, takes it away.

    Args:
        model: A HookedTransformer, a TransformerBridge, or SAELens's HookedProxyLM around a Hugging
            Face model (whose own `generate` then goes through the hook as well).
        sae: A RouteSAE or a crosscoder whose metadata names the hook (`hook_name`) and the L
            residual streams it was trained on (`hook_names`), as any of these models spells them.
        unscaled: Leave p out, at the hook and in the edit, as the paper's code does to evaluate.

    Raises:
        ValueError: one is attached to these blocks already, the SAE's metadata does not fit the
            model, or `unscaled` is asked of a crosscoder, which has no p.
        TypeError: the model has no hook points.
    """
    if isinstance(sae, StackedSAE):
        if unscaled:
            raise ValueError("unscaled=True: a crosscoder has no route probability to leave out")
        return StackedHook(model, sae)
    return RoutedHook(model, sae, unscaled)


class StreamsHook(ABC):
    """A hook point fed by the residual streams of several blocks; what `attach` returns.

    Here is what all of them share: the hooks on the blocks, the clean half and the replay. A
    subclass says what goes through the hook point and how its answer is written to the streams.

    Attributes:
        name: of the hook point.
        routed_blocks: indices of the L blocks whose streams are read.
    """

    def __init__(self, model: LanguageModel, sae: RoutedSAE | StackedSAE) -> None:
        if not hasattr(model, "hook_dict"):
            raise TypeError(
                f"a {type(model).__name__} has no hook points; wrap a Hugging Face model in "
                "SAELens's HookedProxyLM(model, tokenizer)"
            )
        self.model, self.sae = model, sae
        self._blocks = decoder_blocks(model)
        self.name, self.routed_blocks = _read_metadata(sae, d_model(model), len(self._blocks))
        self._first, self._last = self.routed_blocks[0], self.routed_blocks[-1]
        self._pass: _Pass | None = None

        for index in range(self._first, self._last + 1):
            if (other := attached_to(self._blocks[index])) is not None:
                raise ValueError(
                    f"block {index} has a {type(other.sae).__name__} attached already, at "
                    f"{other.name!r}; remove() that one first"
                )
        self._place = _place(model, self._blocks[self._last], self.name)
        self._place.add()
        self._handles = []
        for index in range(self._first, self._last + 1):
            before, after = partial(self._before, index), partial(self._after, index)
            self._handles += [
                self._blocks[index].register_forward_pre_hook(before, with_kwargs=True),
                self._blocks[index].register_forward_hook(after),
            ]

    @property
    def hook_point(self) -> nn.Module:
        """What sits at the hook now: a HookPoint, or the wrapper that `add_sae` put there."""
        return self._place.get()

    def remove(self) -> None:
        """Take the hook point away, and an SAE that was added at it; the model is as it was."""
        if self.name in getattr(self.model, "acts_to_saes", {}):
            self.model.reset_saes(self.name)  # type: ignore[operator]
        if self._handles:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
            self._place.remove()
            self._pass = None

    def __enter__(self: AnyHook) -> AnyHook:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    # --- the hooks on the blocks -----------------------------------------------------------------

    def _before(self, index: int, block: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._pass is not None and self._pass.replay is not None:
            return
        if index == self._first:
            self._pass = _Pass()
        elif self._pass is not None:
            self._pass.calls[index] = _Call(args, kwargs, index)

    def _after(self, index: int, block: nn.Module, args: tuple, output: Any) -> Any:
        current = self._pass
        if current is not None and current.replay is not None:
            return _with_stream(output, self._edit(_stream(output), index, current.replay))
        if current is not None:
            if index in current.calls:
                current.calls[index].end_clean_half()
            if index in self.routed_blocks:
                current.streams[index] = _stream(output)
        if index != self._last:
            return None
        if current is None or len(current.streams) < len(self.routed_blocks):
            raise RuntimeError(
                f"block {index} ran without the routed blocks before it, so there is no value for "
                f"{self.name!r}: start before block {self._first}, or remove() the hook"
            )
        try:
            return self._finish(current, output)
        finally:
            self._pass = None

    # --- steps 2 to 4 ----------------------------------------------------------------------------

    def _finish(self, current: _Pass, output: Any) -> Any:
        """Read and fire; what the last block puts out after a replay, None without one."""
        stream = current.streams[self._first]
        streams = [other.to(self.sae.W_enc.device) for other in current.streams.values()]
        current.streams.clear()
        reading = self._read(torch.stack(streams, dim=-2))
        del streams
        cache_is_edited = any(call.has_twin for call in current.calls.values())
        current.replay = self._replay(reading, cache_is_edited)
        if current.replay is None:
            return None
        # what enters the first routed block was not edited: its tokens are done with one firing
        stream = self._edit(stream, self._first, current.replay)
        output = _with_stream(output, stream)
        for index in range(self._first + 1, self._last + 1):
            output = current.calls[index].again(self._blocks[index], stream)
            stream = _stream(output)
        return output

    @abstractmethod
    def _read(self, x: Float[Tensor, "batch pos L d"]) -> Any:
        """What the SAE makes of the clean streams before it encodes."""

    @abstractmethod
    def _replay(self, reading: Any, cache_is_edited: bool) -> Any:
        """Fire; what `_edit` needs, or None where nothing was edited, now or in the cache."""

    @abstractmethod
    def _edit(
        self, stream: Float[Tensor, "batch pos d"], block: int, replay: Any
    ) -> Float[Tensor, "batch pos d"]:
        """The stream after `block`, edited."""

    def _fire(self, value: Float[Tensor, "batch pos width"]) -> Float[Tensor, "batch pos width"]:
        """What the hook makes of `value`; `value` itself if it lets it be.

        A hook may write in place, so it gets a copy. The copy's version counter tells; a tensor of
        the inference mode has none.
        """
        with torch.inference_mode(False):
            given = value.clone()
        version = given._version
        result = self.hook_point(given)
        if result is given and given._version == version:
            return value
        if result.shape != value.shape:
            raise ValueError(
                f"a hook at {self.name!r} returned {list(result.shape)} for {list(value.shape)}"
            )
        return result.to(value)


class RoutedHook(StreamsHook):
    """A RouteSAE's hook point on a model.

    Attributes:
        routing: how the latest pass was routed (detached; its `x_route` is the clean one), or None.
    """

    sae: RoutedSAE

    def __init__(self, model: LanguageModel, sae: RoutedSAE, unscaled: bool = False) -> None:
        self.unscaled = unscaled
        self.routing: Routing | None = None
        super().__init__(model, sae)

    @override
    def remove(self) -> None:
        super().remove()
        self.routing = None

    @override
    def _read(self, x: Float[Tensor, "batch pos L d"]) -> Routing:
        return self.sae.route(x)

    @override
    def _replay(self, reading: Routing, cache_is_edited: bool) -> _Replay | None:
        self.routing = Routing(*(part.detach() for part in reading))
        x_route, weight = reading.x_route, reading.weight
        if self.unscaled:
            x_route, weight = x_route / weight.unsqueeze(-1), torch.ones_like(weight)

        if _only_an_sae(self.hook_point):
            answer, edited = None, True  # it will be asked block by block
        else:
            answer = self._fire(x_route)
            edited = _is_edited(answer, x_route)
        if not edited and not cache_is_edited:
            return None
        if self.sae.cfg.routing == "soft":
            raise ValueError(
                f"{self.name!r} was edited under soft routing, which mixes all blocks and so has "
                "no single one to write to; only reading works"
            )
        layer = reading.layer.flatten()
        counts = layer.bincount(minlength=len(self.routed_blocks)).tolist()
        tokens = dict(zip(self.routed_blocks, layer.argsort().split(counts), strict=True))
        return _Replay(tokens, weight.flatten().to(x_route), x_route, answer)

    @override
    def _edit(
        self, stream: Float[Tensor, "batch pos d"], block: int, replay: _Replay
    ) -> Float[Tensor, "batch pos d"]:
        """The stream after `block`, edited at the tokens that are routed there."""
        answer, replay.answer = replay.answer, None  # it holds for the first routed block only
        tokens = replay.tokens.get(block)
        if tokens is None or len(tokens) == 0:
            return stream
        rows = _rows(stream, tokens)
        x = rows.to(replay.met)
        mean, scale = normalization_stats(x)
        mean, unit = mean.unsqueeze(-1), (scale / replay.weight[tokens]).unsqueeze(-1)
        if answer is not None:
            met, result = _rows(replay.met, tokens), _rows(answer, tokens)
        else:
            met = (x - mean) / unit
            replay.met = _with_rows(replay.met, tokens, met)
            if _only_an_sae(self.hook_point):
                result = self.hook_point(met.unsqueeze(0)).squeeze(0).to(met)
            else:
                result = _rows(self._fire(replay.met), tokens)
        same = (result == met).all(dim=-1, keepdim=True)
        return _with_rows(stream, tokens, _written(rows, met, result, mean, unit, same))


class StackedHook(StreamsHook):
    """A crosscoder's hook point on a model: all L streams at once."""

    sae: StackedSAE

    @override
    def _read(self, x: Float[Tensor, "batch pos L d"]) -> _Stack:
        return _Stack(self.sae.stack(x), *normalization_stats(x.to(self.sae.dtype)))

    @override
    def _replay(self, reading: _Stack, cache_is_edited: bool) -> _StackReplay | None:
        answer = self._fire(reading.value)
        if not _is_edited(answer, reading.value) and not cache_is_edited:
            return None
        same = (answer == reading.value).all(dim=-1, keepdim=True)
        return _StackReplay(reading, answer, same)

    @override
    def _edit(
        self, stream: Float[Tensor, "batch pos d"], block: int, replay: _StackReplay
    ) -> Float[Tensor, "batch pos d"]:
        """The stream after `block`, written at the tokens whose vector came back changed."""
        if block not in self.routed_blocks:
            return stream
        value, mean, scale = replay.clean
        layer, width = self.routed_blocks.index(block), stream.shape[-1]
        here = slice(layer * width, (layer + 1) * width)
        return _written(
            stream,
            value[..., here],
            replay.answer[..., here],
            mean[..., layer, None],
            scale[..., layer, None],
            replay.same,
        )


def _is_edited(answer: Tensor, value: Tensor) -> bool:
    """Whether a hook changed `value`; a new tensor may carry gradients, which flow in a replay."""
    return answer is not value and (answer.requires_grad or not torch.equal(answer, value))


def _written(
    rows: Float[Tensor, "... d"],
    met: Float[Tensor, "... d"],
    result: Float[Tensor, "... d"],
    mean: Float[Tensor, "... 1"],
    unit: Float[Tensor, "... 1"],
    same: Bool[Tensor, "... 1"],
) -> Float[Tensor, "... d"]:
    """Streams with `result * unit + mean` in place of `rows`, but where nothing was changed.

    There a token keeps its bits, and its gradient is that of adding `(result - met) * unit`.
    """
    kept = rows + ((result - met) * unit).to(rows)
    edited = (result * unit + mean).to(rows)
    return torch.where(same.to(rows.device), kept, edited)


def _only_an_sae(hook_point: nn.Module) -> bool:
    """Whether all there is at the hook is an SAE that nobody watches.

    It treats each token by itself, so only the tokens of a block need go through it there: once
    through the SAE for each token instead of L times. A training SAE may couple tokens (batch
    top-k).
    """
    sae = getattr(hook_point, "sae", None)
    return (
        isinstance(sae, SAE)
        and not isinstance(sae, TrainingSAE)
        and getattr(hook_point, "_token_mask", None) is None
        and not any(
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
            for module in hook_point.modules()
        )
    )


def _rows(x: Float[Tensor, "batch pos d"], tokens: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
    return x.flatten(0, 1)[tokens.to(x.device)]


def _with_rows(
    x: Float[Tensor, "batch pos d"], tokens: Int[Tensor, " n"], rows: Float[Tensor, "n d"]
) -> Float[Tensor, "batch pos d"]:
    return x.flatten(0, 1).index_copy(0, tokens.to(x.device), rows).view(x.shape)


def _stream(output: Any) -> Tensor:
    """The residual stream in a block's output, a tuple in transformers up to 4.53."""
    return output[0] if isinstance(output, tuple) else output


def _with_stream(output: Any, stream: Tensor) -> Any:
    return (stream, *output[1:]) if isinstance(output, tuple) else stream


# --- the state of one pass -----------------------------------------------------------------------


@dataclass
class _Pass:
    """What a forward pass has left so far; its `replay` is set while there is one."""

    streams: dict[int, Tensor] = field(default_factory=dict)
    """Outputs of the routed blocks."""
    calls: dict[int, _Call] = field(default_factory=dict)
    """Calls of the blocks after the first routed one."""
    replay: _Replay | _StackReplay | None = None


@dataclass
class _Replay:
    tokens: dict[int, Int[Tensor, " n"]]
    """Routed block -> the tokens that are routed there, as indices into batch * pos."""
    weight: Float[Tensor, " tokens"]
    """p of every token."""
    met: Float[Tensor, "batch pos d"]
    """The activation every token met at its own block; the clean one until it gets there."""
    answer: Float[Tensor, "batch pos d"] | None
    """What the hook made of the clean `met`, for the first routed block; None if it asks itself."""


class _Stack(NamedTuple):
    value: Float[Tensor, "batch pos Ld"]
    """The normalised streams, one after the other: what goes through the hook."""
    mean: Float[Tensor, "batch pos L"]
    """Mean of each stream."""
    scale: Float[Tensor, "batch pos L"]
    """Scale of each stream."""


class _StackReplay(NamedTuple):
    clean: _Stack
    """What the crosscoder read."""
    answer: Float[Tensor, "batch pos Ld"]
    """What the hook made of it."""
    same: Bool[Tensor, "batch pos 1"]
    """The tokens that it let be."""


class _Call:
    """One block's call: its other inputs and, with a key-value cache, its entry of the cache.

    TransformerLens and Hugging Face grow an entry by binding new tensors to its attributes, so the
    attributes are its state, and keeping the old ones is enough to roll it back.
    """

    def __init__(self, args: tuple, kwargs: dict, index: int) -> None:
        """Begin the clean half: the clean twin, if there is one, takes the entry's place."""
        # all but the stream, which comes first or by its name
        self._args = args[1:]
        self._kwargs = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        self._entry = _cache_entry((*args, *kwargs.values()), index)
        self._before = self._clean = _state(self._entry)
        twin: _Twin | None = getattr(self._entry, _TWIN, None)
        self.has_twin = twin is not None
        if twin is not None:
            if any(self._before.get(name) is not value for name, value in twin.edited.items()):
                raise RuntimeError(
                    "the key-value cache was cropped, reordered or grown by something else while "
                    "it held edits (beam search does this): start from a new one, or use none"
                )
            vars(self._entry).update(twin.clean)

    def end_clean_half(self) -> None:
        self._clean = _state(self._entry)

    def again(self, block: nn.Module, stream: Tensor) -> Any:
        """The block's output for another stream; the cache goes on from before the clean half."""
        if self._entry is not None:
            _check_grows(self._entry)
            vars(self._entry).update(self._before)
        output = block(stream, *self._args, **self._kwargs)
        if self._entry is not None:
            setattr(self._entry, _TWIN, _Twin(clean=self._clean, edited=_state(self._entry)))
        return output


# --- key-value caches ----------------------------------------------------------------------------

_TWIN = "_route_clean_twin"


@dataclass
class _Twin:
    """Kept on a cache entry: its state in the clean model, and its own at that time."""

    clean: dict[str, Any]
    edited: dict[str, Any]


def _cache_entry(inputs: tuple, index: int) -> Any:
    """Block `index`'s cache entry among its inputs, under whatever name; None without a cache."""
    for value in inputs:
        if hasattr(value, "past_keys"):  # TransformerLens hands each block its entry
            return value
        if isinstance(value, cache_utils.Cache):
            layers = getattr(value, "layers", None)
            if layers is None:
                return value
            new_layer: Callable[[], Any] | None = getattr(value, "layer_class_to_replicate", None)
            while new_layer is not None and len(layers) <= index:
                layers.append(new_layer())  # as the cache itself would a moment later
            return layers[index] if index < len(layers) else None
    return None


def _state(entry: Any) -> dict[str, Any]:
    """Everything an entry consists of, but for `frozen`, which its user may turn on and off."""
    attributes = {} if entry is None else vars(entry)
    return {name: v for name, v in attributes.items() if name not in (_TWIN, "frozen")}


def _check_grows(entry: Any) -> None:
    growing = getattr(cache_utils, "DynamicLayer", ())
    is_growing = isinstance(entry, growing) and not hasattr(entry, "conv_states")
    if not (is_growing or hasattr(entry, "past_keys")):
        raise ValueError(
            f"edits at a routed hook cannot be kept in a {type(entry).__name__}, which is written "
            "in place: use a DynamicCache (transformers >= 4.54) or use_cache=False"
        )


# --- kinds of models -----------------------------------------------------------------------------


class _Place:
    """Where the hook point lives in a HookedTransformer: an attribute of the last routed block.

    `add_sae` replaces the attribute, so it is looked up each time.
    """

    def __init__(self, model: Any, block: nn.Module, name: str) -> None:
        self.model, self.block, self.name = model, block, name
        self.attribute = name.rsplit(".", 1)[-1]

    def get(self) -> nn.Module:
        return getattr(self.block, self.attribute)

    def add(self) -> None:
        setattr(self.block, self.attribute, HookPoint())
        self.model.setup()

    def remove(self) -> None:
        delattr(self.block, self.attribute)
        self.model.setup()


class _PlaceOnBridge(_Place):
    """The same, entered by hand into the bridge's registries, which are never rebuilt."""

    @override
    def add(self) -> None:
        hook_point = HookPoint()
        setattr(self.block, self.attribute, hook_point)
        self.model._hook_registry[self.name] = hook_point
        hook_point.name = self.name

    @override
    def remove(self) -> None:
        delattr(self.block, self.attribute)
        self.block._hook_registry.pop(self.attribute, None)  # type: ignore[operator]
        self.model._hook_registry.pop(self.name, None)


class _PlaceOnProxy(_Place):
    """An entry of the proxy's dictionaries; its `stop_at_layer` looks up the module to stop at."""

    @override
    def get(self) -> nn.Module:
        return self.model.hook_dict[self.name]

    @override
    def add(self) -> None:
        hook_point = HookPoint()
        hook_point.name = self.name
        self.model.hook_dict[self.name] = self.model.mod_dict[self.name] = hook_point
        self.model.named_modules_dict[self.name] = self.block

    @override
    def remove(self) -> None:
        for names in (self.model.hook_dict, self.model.mod_dict, self.model.named_modules_dict):
            del names[self.name]


def _place(model: Any, block: nn.Module, name: str) -> _Place:
    if name in model.hook_dict:
        raise ValueError(f"hook_name={name!r} is the name of another hook point of the model")
    if isinstance(model, HookedProxyLM):
        return _PlaceOnProxy(model, block, name)
    return (_Place if isinstance(model, HookedTransformer) else _PlaceOnBridge)(model, block, name)


def attached_to(block: nn.Module) -> StreamsHook | None:
    """The hook of a RouteSAE or crosscoder that watches this block."""
    for hook in block._forward_hooks.values():
        owner = getattr(getattr(hook, "func", None), "__self__", None)
        if isinstance(owner, StreamsHook):
            return owner
    return None


def _read_metadata(sae: RoutedSAE | StackedSAE, width: int, n_blocks: int) -> tuple[str, list[int]]:
    """The hook's name and the routed blocks, checked against the model's width and depth."""
    name, names = sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_names
    if not name or not names:
        raise ValueError(
            f"sae.cfg.metadata has hook_name={name!r} and hook_names={names!r}: the name of the "
            "routed hook and those of the routed residual streams are needed"
        )
    found = [re.search(r"(?:^|\.)(\d+)(?:\.hook_resid_post|\.hook_out)?$", n) for n in names]
    blocks = [int(match.group(1)) for match in found if match is not None]
    if len(blocks) < len(names) or blocks != sorted(set(blocks)) or blocks[-1] >= n_blocks:
        raise ValueError(
            f"hook_names={names} must be residual streams after blocks, in order; the model has "
            f"blocks 0 to {n_blocks - 1}"
        )
    if not name.startswith(f"blocks.{blocks[-1]}."):
        raise ValueError(f"hook_name={name!r} must begin with the last block, blocks.{blocks[-1]}.")
    field = "d_model" if isinstance(sae, StackedSAE) else "d_in"
    if (len(blocks), width) != (sae.cfg.n_routed_layers, getattr(sae.cfg, field)):
        raise ValueError(
            f"{len(blocks)} hook_names and a model of width {width} do not fit an SAE with "
            f"n_routed_layers={sae.cfg.n_routed_layers} and {field}={getattr(sae.cfg, field)}"
        )
    return name, blocks


# --- the model class -----------------------------------------------------------------------------


class RouteSAETransformer(HookedSAETransformer):
    """A HookedSAETransformer that attaches RouteSAEs and crosscoders by itself where one is added.

    `add_sae`, `saes()`, `run_with_saes` and its kin take them beside ordinary SAEs; resetting
    one detaches it. One that was attached by hand (to choose `unscaled`, say) stays attached.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._routed_hooks: dict[str, StreamsHook] = {}

    @override
    def add_sae(self, sae: SAE[Any], *args: Any, **kwargs: Any) -> None:
        if isinstance(sae, RoutedSAE | StackedSAE):
            self._attach(sae)
        super().add_sae(sae, *args, **kwargs)

    def _attach(self, sae: RoutedSAE | StackedSAE) -> None:
        name = sae.cfg.metadata.hook_name
        attached = (attached_to(block) for block in self.blocks)
        if any(hook is not None and hook.name == name and hook.sae is sae for hook in attached):
            return
        if name in self._routed_hooks:
            self._routed_hooks[name].remove()
        self._routed_hooks[name] = attach(self, sae)

    @override
    def _reset_sae(self, act_name: str, prev_wrapper: Any = None) -> None:
        super()._reset_sae(act_name, prev_wrapper)
        if act_name in self._routed_hooks and act_name not in self._acts_to_saes:
            self._routed_hooks.pop(act_name).remove()
