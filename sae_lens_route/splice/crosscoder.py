"""A crosscoder's hook point: the streams of all L blocks pass side by side, and all are written."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import override

from sae_lens_route.saes.crosscoder import CrosscoderSAEMixin
from sae_lens_route.saes.router import normalization_stats
from sae_lens_route.splice.hook import StreamsHook, is_edited, write_result


class _Reading(NamedTuple):
    value: Float[Tensor, "batch pos Ld"]
    """The normalized streams side by side: the input of the hook point."""
    mean: Float[Tensor, "batch pos L"]
    """Mean of each stream."""
    scale: Float[Tensor, "batch pos L"]
    """Scale of each stream."""


class _Replay(NamedTuple):
    clean: _Reading
    result: Float[Tensor, "batch pos Ld"]
    """Output of the hook point."""
    unchanged: Bool[Tensor, "batch pos 1"]
    """True for the tokens whose vector the hook left unchanged."""


class CrosscoderHook(StreamsHook[_Reading, _Replay]):
    """A crosscoder's hook point on a model."""

    sae: CrosscoderSAEMixin

    @override
    def _read(self, x: Float[Tensor, "batch pos L d"]) -> _Reading:
        return _Reading(self.sae.concat_blocks(x), *normalization_stats(x.to(self.sae.dtype)))

    @override
    def _begin_replay(self, reading: _Reading, cache_is_edited: bool) -> _Replay | None:
        result = self._fire(reading.value)
        if not is_edited(result, reading.value) and not cache_is_edited:
            return None
        unchanged = (result == reading.value).all(dim=-1, keepdim=True)
        return _Replay(reading, result, unchanged)

    @override
    def _edit(
        self, stream: Float[Tensor, "batch pos d"], block: int, replay: _Replay
    ) -> Float[Tensor, "batch pos d"]:
        """The stream after `block`, written at the tokens whose vector came back changed."""
        if block not in self.routed_blocks:
            return stream
        value, mean, scale = replay.clean
        i, width = self.routed_blocks.index(block), stream.shape[-1]
        part = slice(i * width, (i + 1) * width)
        return write_result(
            stream,
            value[..., part],
            replay.result[..., part],
            mean[..., i, None],
            scale[..., i, None],
            replay.unchanged,
        )
