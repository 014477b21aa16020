"""The splice: a hook point fed by the residual streams of the routed blocks.

`attach(model, sae)` adds a TransformerLens `HookPoint` named `sae.cfg.metadata.hook_name` to the
model. The routed activation `[batch, pos, d]` passes through it, so whatever reads or edits a hook
(`run_with_cache`, `run_with_hooks`, `add_sae`, `run_evals`) reads or edits routed features. One
forward pass, with i*(t) the routed block of token t:

1. *Collect.* Hooks on the blocks keep the outputs of the routed blocks, and the arguments of every
   block after the first routed one.
2. *Route.* After the last routed block all streams are available, and the router chooses i*(t) and
   p(t). It sees the unedited model: an edit of an early block has no influence on the choice.
   (Uniform routing draws again in every pass, unless `with_routes` fixes the draw.)
3. *Fire.* x_route passes through the hook point. If it comes back unchanged, the pass continues,
   and nothing was computed twice.
4. *Replay.* Otherwise the blocks after the first routed one run again with the same arguments. The
   output x of routed block i is edited at the tokens with i*(t) = i; with f the function at the
   hook point,

       x  <-  f(p n(x)) / p * scale + mean,       n(x) = (x - mean) / scale,  scale = std + 1e-6.

   The hook point fires once per routed block that has tokens. Its input holds the latest p n(x) of
   every token at its routed block, so the last firing shows the activations that were used, for
   all tokens. The result of the replay replaces the clean one.
5. *Caches.* With a key-value cache the clean half must attend to clean keys and values, the replay
   to edited ones. The cache holds the edited ones. Once they differ, each entry carries its clean
   twin, which replaces it during the clean half; from then on every pass is replayed.

A crosscoder reads and writes all L streams. The normalized streams pass through its hook point
side by side, `[batch, pos, L*d]`, with two differences. *Fire*: once per pass, with the clean
streams. *Replay*: a token whose vector came back changed gets, after each of the L blocks, that
block's part of the vector with the clean stream's scale and mean; any other token keeps its current
stream. Since the last routed block is overwritten too, what was written to a token at earlier
blocks reaches the logits only through attention from unchanged tokens (a BOS that the SAE excludes,
positions outside a steering), in this pass or later through a cache.

Gradients flow through all of it, including p and the clean half. A backward hook at the hook point
sees one gradient per firing, zero outside the tokens of that block: their sum is the gradient. The
`hidden_states` that a Hugging Face model returns on request contain replayed blocks twice.

Steps 1, 3 and the loop of 4 are here, for both kinds of SAE; `routed.py` and `crosscoder.py` hold
what passes through the hook point and how it is written, `calls.py` the arguments and caches,
`passes.py` what a pass is, `model_calls.py` which thread may use the model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import nullcontext
from functools import partial
from typing import Any, Generic, TypeVar, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sae_lens_route.errors import UserError
from sae_lens_route.models.kinds import (
    LanguageModel,
    d_model,
    decoder_blocks,
    hook_point_home,
    residual_of,
    with_residual,
)
from sae_lens_route.saes.crosscoder import CrosscoderSAEMixin
from sae_lens_route.saes.metadata import routed_blocks
from sae_lens_route.saes.routed import RoutedSAEMixin
from sae_lens_route.splice.calls import BlockCall
from sae_lens_route.splice.model_calls import ModelCalls
from sae_lens_route.splice.passes import Pass, ReadingT, ReplayT

AnyHook = TypeVar("AnyHook", bound="StreamsHook[Any, Any]")


class StreamsHook(ABC, Generic[ReadingT, ReplayT]):
    """A hook point fed by the residual streams of several blocks; what `attach` returns.

    Attributes:
        name: name of the hook point.
        routed_blocks: the L blocks whose streams are read.
    """

    def __init__(self, model: LanguageModel, sae: RoutedSAEMixin | CrosscoderSAEMixin) -> None:
        if not hasattr(model, "hook_dict"):
            raise TypeError(
                f"a {type(model).__name__} has no hook points; wrap a Hugging Face model in "
                "SAELens's HookedProxyLM(model, tokenizer)"
            )
        self.model, self.sae = model, sae
        self._blocks = decoder_blocks(model)
        self.routed_blocks = _fitting_blocks(sae, d_model(model), len(self._blocks))
        self.name: str = sae.cfg.metadata.hook_name
        self._first, self._last = self.routed_blocks[0], self.routed_blocks[-1]
        self._handles = []
        self._calls = ModelCalls.watch(model)
        try:
            with self._calls.alone("attach()"):
                self._add()
        except BaseException:
            self._calls.release(model)
            raise

    def _add(self) -> None:
        for index in range(self._first, self._last + 1):
            if (other := attached_hook(self._blocks[index])) is not None:
                raise UserError(
                    f"block {index} has a {type(other.sae).__name__} attached already, at "
                    f"{other.name!r}; remove() that one first"
                )
        self._home = hook_point_home(self.model, self._blocks[self._last], self.name)
        self._home.add()
        for index in range(self._first, self._last + 1):
            before, after = partial(self._before, index), partial(self._after, index)
            self._handles += [
                self._blocks[index].register_forward_pre_hook(before, with_kwargs=True),
                self._blocks[index].register_forward_hook(after),
            ]

    @property
    def hook_point(self) -> nn.Module:
        """The HookPoint, or the wrapper by which `add_sae` replaced it."""
        self._require_attached()
        return self._home.get()

    def remove(self) -> None:
        """Remove the hook point and an SAE added at it; the model is as it was before.

        It is never refused: what other threads are doing at the hook point is.
        """
        if self._handles:
            self._calls.announce_removal(self.name)
        if self.name in getattr(self.model, "acts_to_saes", {}):
            cast("Any", type(self.model)).reset_saes(self.model, self.name)
        if self._handles:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
            self._calls.frame.passes.pop(self, None)
            self._calls.release(self.model)
            self._home.remove()

    def __enter__(self: AnyHook) -> AnyHook:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    # --- the hooks on the blocks -----------------------------------------------------------------

    def _before(self, index: int, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        frame, current = self._calls.frame, self._unfinished
        stream = args[0] if args else kwargs["hidden_states"]
        if index == self._first and (current is None or not frame.is_call):
            current = frame.passes[self] = Pass(next_block=index, output=stream)
        follows = frame.is_call or (current is not None and stream is current.output)
        if current is not None and follows and current.begin_block(index):
            if current.replay is None:
                current.calls[index] = BlockCall(args, kwargs, index)
            return
        frame.passes[self] = Pass(next_block=-1)  # none: nothing that follows in this call counts
        is_read = current is not None and current.reading is not None
        if is_read or index == self._last:
            raise RuntimeError(self._out_of_order(index))

    def _after(
        self, index: int, block: nn.Module, args: tuple, output: Tensor | tuple
    ) -> Tensor | tuple | None:
        current = self._unfinished
        if current is None or current.running != index:
            return None
        stream = residual_of(output)
        if current.replay is not None:
            stream = self._edit(stream, index, current.replay)
            current.end_block(index, stream)
            return with_residual(output, stream)
        current.end_block(index, stream)
        current.calls[index].end_clean_half()
        if index in self.routed_blocks:
            current.streams[index] = stream
        if index != self._last:
            return None
        frame = self._calls.frame
        try:
            # blocks that are called one by one are a pass of the model from here on
            with nullcontext() if frame.is_call else self._calls.overlapping(frame):
                return self._finish(current, output)
        finally:
            frame.passes.pop(self, None)

    @property
    def _unfinished(self) -> Pass[ReadingT, ReplayT] | None:
        """The pass of this hook in this thread's innermost call."""
        return self._calls.frame.passes.get(self)

    def _out_of_order(self, index: int) -> str:
        return (
            f"block {index} ran without the routed blocks before it in the same pass, so "
            f"{self.name!r} has no value: start at block {self._first} or before it, or remove() "
            "the hook. (A pass that began before attach(), that skips or repeats a block, or that "
            "gradient checkpointing runs again in backward has none either.)"
        )

    # --- steps 2 to 4 ----------------------------------------------------------------------------

    def _finish(
        self, current: Pass[ReadingT, ReplayT], output: Tensor | tuple
    ) -> Tensor | tuple | None:
        """Read, fire and replay; returns the last block's output, None if it stays as it is."""
        stream = current.streams[self._first]
        streams = [other.to(self.sae.W_enc.device) for other in current.streams.values()]
        current.streams.clear()
        current.output = None
        current.reading = self._read(torch.stack(streams, dim=-2))
        del streams
        cache_is_edited = any(call.has_twin for call in current.calls.values())
        if current.calls[self._first].has_twin:
            raise RuntimeError(
                f"the key-value cache holds edits of an SAE that was attached to other blocks, and "
                f"block {self._first} would need them twice: use a new cache"
            )
        current.replay = self._begin_replay(current.reading, cache_is_edited)
        if current.replay is not None:
            output = self._replay(current, current.replay, stream, output)
            self._require_same_contents()
        self._calls.frame.end_pass(current)
        return None if current.replay is None else output

    def _replay(
        self,
        current: Pass[ReadingT, ReplayT],
        replay: ReplayT,
        stream: Float[Tensor, "batch pos d"],
        output: Tensor | tuple,
    ) -> Tensor | tuple:
        """The last block's output after the blocks ran again with the edits in."""
        # The input of the first routed block is not edited, so that block need not run again.
        stream = self._edit(stream, self._first, replay)
        output = with_residual(output, stream)
        current.next_block = self._first + 1
        for index in range(self._first + 1, self._last + 1):
            current.output = stream
            output = current.calls[index].replay(self._blocks[index], stream)
            stream = residual_of(output)
        return output

    @abstractmethod
    def _read(self, x: Float[Tensor, "batch pos L d"]) -> ReadingT:
        """The SAE's routing or normalization of the clean streams, before it encodes."""

    @abstractmethod
    def _begin_replay(self, reading: ReadingT, cache_is_edited: bool) -> ReplayT | None:
        """Fire; returns what `_edit` needs, None if nothing is edited here or in the cache."""

    @abstractmethod
    def _edit(
        self, stream: Float[Tensor, "batch pos d"], block: int, replay: ReplayT
    ) -> Float[Tensor, "batch pos d"]:
        """The edited stream after `block`."""

    def _run_hook_point(self, value: Float[Tensor, "batch pos width"]) -> Tensor:
        frame, point = self._calls.frame, self.hook_point
        if frame.overlapping and getattr(point, "exclude_special_tokens", False) is not False:
            raise UserError(
                f"the SAE at {self.name!r} was added with exclude_special_tokens, and two passes "
                "overlap: SAELens keeps one mask of tokens only. Run one pass at a time"
            )
        if frame.overlapping - {frame.thread} and getattr(point, "use_error_term", False):
            raise UserError(
                f"the SAE at {self.name!r} has an error term, and passes of two threads overlap: "
                "SAELens computes it with the SAE's hooks off, for all. Run one pass at a time"
            )
        self._require_same_contents()
        return point(value)

    def _require_attached(self) -> None:
        if not self._handles:
            raise RuntimeError(f"{self.name!r} was removed; remove() it between passes, not in one")

    def _require_same_contents(self) -> None:
        """Raise unless all firings of this pass meet the same hooks, or the same SAE."""
        current = self._unfinished
        contents = [(module, *module._forward_hooks) for module in self.hook_point.modules()]
        assert current is not None
        if current.contents is None:
            current.contents = contents
        elif current.contents != contents:
            raise RuntimeError(
                f"hooks or SAEs at {self.name!r} changed within a pass: change them between passes"
            )

    def _fire(self, value: Float[Tensor, "batch pos width"]) -> Float[Tensor, "batch pos width"]:
        """Run the hook point on a copy of `value`; returns `value` itself if it was left unchanged.

        A hook may write in place, hence the copy. The copy's version counter tells; a tensor
        created in inference mode has none.
        """
        with torch.inference_mode(False):
            given = value.clone()
        version = given._version
        result = self._run_hook_point(given)
        if result is given and given._version == version:
            return value
        if result.shape != value.shape:
            raise UserError(
                f"a hook at {self.name!r} returned {list(result.shape)} for {list(value.shape)}"
            )
        return result.to(value)


def is_edited(result: Tensor, value: Tensor) -> bool:
    """Whether a hook changed `value`; an equal tensor with gradients counts, to let them flow."""
    return result is not value and (result.requires_grad or not torch.equal(result, value))


def write_result(
    stream: Float[Tensor, "... d"],
    value: Float[Tensor, "... d"],
    result: Float[Tensor, "... d"],
    mean: Float[Tensor, "... 1"],
    unit: Float[Tensor, "... 1"],
    unchanged: Bool[Tensor, "... 1"],
) -> Float[Tensor, "... d"]:
    """`result * unit + mean`, and `stream` where the hook left `value` unchanged.

    An unchanged token is bit-identical, with the gradient of adding `(result - value) * unit`.
    """
    kept = stream + ((result - value) * unit).to(stream)
    edited = (result * unit + mean).to(stream)
    return torch.where(unchanged.to(stream.device), kept, edited)


def attached_hook(block: nn.Module) -> StreamsHook[Any, Any] | None:
    """The hook of the RouteSAE or crosscoder that is attached to this block."""
    for hook in block._forward_hooks.values():
        owner = getattr(getattr(hook, "func", None), "__self__", None)
        if isinstance(owner, StreamsHook):
            return owner
    return None


def _fitting_blocks(
    sae: RoutedSAEMixin | CrosscoderSAEMixin, width: int, n_blocks: int
) -> list[int]:
    """The SAE's routed blocks, its metadata checked against the model's width and depth."""
    blocks, name = routed_blocks(sae), sae.cfg.metadata.hook_name
    if blocks != sorted(set(blocks)) or blocks[0] < 0 or blocks[-1] >= n_blocks:
        raise UserError(
            f"metadata: the routed blocks {blocks} must be in order; the model has blocks 0 to "
            f"{n_blocks - 1}"
        )
    if not str(name).startswith(f"blocks.{blocks[-1]}."):
        raise UserError(
            f"metadata.hook_name={name!r}: must begin with the last routed block, "
            f"blocks.{blocks[-1]}."
        )
    sae_width = sae.cfg.d_model if isinstance(sae, CrosscoderSAEMixin) else sae.cfg.d_in
    if sae_width != width:
        raise UserError(f"the SAE reads streams of width {sae_width}, the model has width {width}")
    return blocks
