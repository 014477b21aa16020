"""A RouteSAE's hook point: the routed activation passes, and the token's block is written."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from sae_lens.saes.sae import SAE, TrainingSAE
from torch import Tensor, nn
from typing_extensions import override

from sae_lens_route.errors import UserError
from sae_lens_route.models.kinds import LanguageModel
from sae_lens_route.saes.routed import RoutedSAEMixin
from sae_lens_route.saes.router import Routing, normalization_stats
from sae_lens_route.splice.hook import StreamsHook, is_edited, write_result


@dataclass
class _Replay:
    tokens: dict[int, Int[Tensor, " n"]]
    """Routed block -> the tokens that are routed there, as indices into batch * pos."""
    weight: Float[Tensor, " tokens"]
    """p of every token."""
    x_route: Float[Tensor, "batch pos d"]
    """Latest p n(x) of every token at its routed block; clean until the replay reaches it."""
    result: Float[Tensor, "batch pos d"] | None
    """Output of the hook point for the clean `x_route`, valid up to the first routed block."""


class RoutedHook(StreamsHook[Routing, _Replay]):
    """A RouteSAE's hook point on a model."""

    sae: RoutedSAEMixin

    def __init__(self, model: LanguageModel, sae: RoutedSAEMixin, unscaled: bool = False) -> None:
        self.unscaled = unscaled
        super().__init__(model, sae)

    @property
    def routing(self) -> Routing | None:
        """The routing of this thread's latest pass; within a call of the model, of that call.

        It is detached, and its `x_route` is the clean one. None before a pass and after `remove`.
        """
        frame = self._calls.frame
        return frame.read.get(self, frame.read_within.get(self))

    @override
    def remove(self) -> None:
        super().remove()
        self._calls.frame.read.pop(self, None)

    @override
    def _read(self, x: Float[Tensor, "batch pos L d"]) -> Routing:
        return self.sae.route(x)

    @override
    def _begin_replay(self, reading: Routing, cache_is_edited: bool) -> _Replay | None:
        self._calls.frame.read[self] = Routing(*(part.detach() for part in reading))
        x_route, weight = reading.x_route, reading.weight
        if self.unscaled:
            x_route, weight = x_route / weight.unsqueeze(-1), torch.ones_like(weight)

        if _holds_only_an_sae(self.hook_point):
            result, edited = None, True  # the SAE runs block by block
        else:
            result = self._fire(x_route)
            edited = is_edited(result, x_route)
        if not edited and not cache_is_edited:
            return None
        if self.sae.cfg.routing == "soft":
            raise UserError(
                f"{self.name!r} was edited under soft routing, which mixes all blocks and so has "
                "no single block to write to; only reading works"
            )
        route = reading.route.flatten()
        counts = route.bincount(minlength=len(self.routed_blocks)).tolist()
        tokens = dict(zip(self.routed_blocks, route.argsort().split(counts), strict=True))
        return _Replay(tokens, weight.flatten().to(x_route), x_route, result)

    @override
    def _edit(
        self, stream: Float[Tensor, "batch pos d"], block: int, replay: _Replay
    ) -> Float[Tensor, "batch pos d"]:
        """The stream after `block`, edited at the tokens that are routed there."""
        clean_result, replay.result = replay.result, None
        tokens = replay.tokens.get(block)
        if tokens is None or len(tokens) == 0:
            return stream
        rows = _rows(stream, tokens)
        x = rows.to(replay.x_route)
        mean, scale = normalization_stats(x)
        mean, unit = mean.unsqueeze(-1), (scale / replay.weight[tokens]).unsqueeze(-1)
        if clean_result is not None:
            value, result = _rows(replay.x_route, tokens), _rows(clean_result, tokens)
        else:
            value = (x - mean) / unit
            replay.x_route = _with_rows(replay.x_route, tokens, value)
            if _holds_only_an_sae(self.hook_point):
                result = self._run_hook_point(value.unsqueeze(0)).squeeze(0).to(value)
            else:
                result = _rows(self._fire(replay.x_route), tokens)
        unchanged = (result == value).all(dim=-1, keepdim=True)
        edited = write_result(rows, value, result, mean, unit, unchanged)
        return _with_rows(stream, tokens, edited)


def _holds_only_an_sae(hook_point: nn.Module) -> bool:
    """True if the hook point holds only an inference SAE, with no hooks and no token mask.

    Such an SAE treats each token by itself, so only a block's tokens need to pass through it at
    that block: each token once instead of L times. A training SAE may couple tokens (batch top-k).
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
