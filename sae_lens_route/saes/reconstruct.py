"""What an SAE makes of its input, with as few activations in memory as possible.

`sae.decode(sae.encode(x))` holds d_sae activations for every token, and multiplies all of them by
the decoder. `reconstruct` takes a piece of the tokens at a time, and of a TopK SAE only the k
active features: then only the encoder's product needs every feature (`sparse_topk.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from sae_lens.saes.sae import SAE, TrainingSAE
from sae_lens.saes.topk_sae import TopK, TopKSAE
from torch import Tensor

from sae_lens_route.saes.sparse_topk import PRECISE, rows_by_token

_PIECE = 2**22
"""Feature activations computed at a time: 16 MB in float32."""


def reconstruct(sae: SAE[Any], x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
    """`sae.decode(sae.encode(x))`, equal up to rounding."""
    pieces = [code.decoded(sae) for code in _codes(sae, x.flatten(0, -2))]
    return torch.cat(pieces).view(x.shape)


def reconstruct_and_count(
    sae: SAE[Any], x: Float[Tensor, "tokens d"]
) -> tuple[Float[Tensor, "tokens d"], Int[Tensor, " d_sae"]]:
    """The reconstruction, and the number of tokens at which each feature is active."""
    pieces = [(code.decoded(sae), code.n_active(sae)) for code in _codes(sae, x)]
    x_hat, n_active = zip(*pieces, strict=True)
    return torch.cat(x_hat), torch.stack(n_active).sum(0)


class _Code(NamedTuple):
    acts: Float[Tensor, "tokens d_sae"]

    def decoded(self, sae: SAE[Any]) -> Float[Tensor, "tokens d"]:
        return sae.decode(self.acts)

    def n_active(self, sae: SAE[Any]) -> Int[Tensor, " d_sae"]:
        return (self.acts != 0).sum(0)


class _TopKCode(NamedTuple):
    features: Int[Tensor, "tokens k"]
    acts: Float[Tensor, "tokens k"]

    def decoded(self, sae: SAE[Any]) -> Float[Tensor, "tokens d"]:
        acts = self.acts.to(sae.W_dec.dtype)  # which autocast has changed
        return rows_by_token(self.features, acts, sae.W_dec) + sae.b_dec

    def n_active(self, sae: SAE[Any]) -> Int[Tensor, " d_sae"]:
        n_active = self.features.new_zeros(sae.cfg.d_sae)
        return n_active.index_add(0, self.features.flatten(), (self.acts != 0).flatten().long())


def _codes(sae: SAE[Any], x: Float[Tensor, "tokens d"]) -> Iterator[_Code | _TopKCode]:
    """Feature activations, a piece of the tokens at a time.

    An SAE in training gets all tokens at once, because it may couple them (batch top-k).
    """
    couples_tokens = isinstance(sae, TrainingSAE)
    topk = cast("TopKSAE", sae) if _is_topk(sae) else None
    size = len(x) if couples_tokens else _PIECE // sae.cfg.d_sae
    for piece in x.split(max(1, size)):
        if topk is not None:
            hidden_pre = torch.addmm(topk.b_enc, topk.process_sae_in(piece), topk.W_enc)
            acts, features = hidden_pre.topk(topk.cfg.k, sorted=False)
            yield _TopKCode(features, acts.relu())
        else:
            yield _Code(sae.encode(piece))


def _is_topk(sae: SAE[Any]) -> bool:
    """Whether SAELens's own TopK inference code would run, and no hook look at its steps."""
    return (
        type(sae).encode is TopKSAE.encode
        and type(sae).decode is TopKSAE.decode
        and type(sae.activation_fn) is TopK
        and not sae.cfg.rescale_acts_by_decoder_norm
        and sae.W_dec.dtype in PRECISE
        and not any(_has_hooks(module) for module in sae.modules())
    )


def _has_hooks(module: torch.nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)
