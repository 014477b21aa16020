"""TopK training that computes with k features per token wherever it can, instead of all d_sae.

Of the six matrix products of a TopK training step (encoder, decoder, and two gradients of each),
only the encoder's needs every feature. The others are sums of k rows per token:

    decode      x_hat_t = sum_j z_tj W_dec[i_tj]                     i_tj: the k features of token t
    gradients   dz_tj = g_t . W_dec[i_tj],     dW_dec[i] = sum of z_tj g_t over (t, j) with i_tj = i
                dx_t = sum_j dz_tj W_enc[:, i_tj],               dW_enc[:, i] likewise with x_t

and `torch.nn.functional.embedding_bag` is a fast kernel for exactly such sums. Activations go from
encoder to decoder as SAELens's own sparse form of them, a COO tensor (`use_sparse_activations`);
`SparseTopKTrainingSAE` only replaces the products, in `encode_with_hidden_pre` and `decode`.
SAELens's code takes over where these do not apply (`products_are_sparse`).

Measured at d 256, d_sae 2048, k 32, 2048 tokens on two CPU cores: `benchmarks/sweep.py` and
`docs/training.md`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens.saes.topk_sae import TopKTrainingSAEConfig
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag
from typing_extensions import override

from sae_lens_route.saes.asynchronous import AsynchronousTopK

PRECISE = (torch.float32, torch.float64)
"""Precise enough for sums over many rows."""


@dataclass(kw_only=True)
class SparseTopKTrainingConfig(TopKTrainingSAEConfig):
    """SAELens's TopK training configuration with a third choice about sparse activations.

    Args:
        use_sparse_activations: pass the k active features from encoder to decoder as a sparse COO
            tensor. None means where it is faster: on the CPU, in float32 or float64, without
            autocast. The SAE decides at run time, because the runner may move it to another device.
    """

    use_sparse_activations: bool | None = None  # type: ignore[assignment]


class SparseTopKTrainingSAE(AsynchronousTopK):
    """SAELens's TopK training SAE with sparse products on the CPU."""

    cfg: SparseTopKTrainingConfig  # type: ignore[assignment]

    @override
    def encode(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_sae"]:
        """Feature activations, always dense, as those of the saved SAE are."""
        feature_acts, _ = self.encode_with_hidden_pre(x)
        return feature_acts.to_dense() if feature_acts.is_sparse else feature_acts

    @override
    def encode_with_hidden_pre(
        self, x: Float[Tensor, "... d_in"]
    ) -> tuple[Float[Tensor, "... d_sae"], Float[Tensor, "... d_sae"]]:
        """Feature activations (sparse COO where the products are sparse) and pre-activations."""
        hook = self.hook_sae_acts_pre
        hooked = len(hook._forward_hooks) > 0 or len(hook._backward_hooks) > 0
        if hooked or not self.products_are_sparse(x):
            return super().encode_with_hidden_pre(x)
        feature_acts, hidden_pre = SparseEncode.apply(
            self.process_sae_in(x), self.W_enc, self.b_enc, self.cfg.k
        )
        return self.hook_sae_acts_post(feature_acts), hidden_pre

    @override
    def decode(self, feature_acts: Float[Tensor, "... d_sae"]) -> Float[Tensor, "... d_in"]:
        """Reconstruction from dense or sparse feature activations."""
        if not (
            feature_acts.is_sparse
            and self.products_are_sparse(feature_acts)
            and _has_equal_rows(feature_acts)
        ):
            return super().decode(feature_acts)
        sae_out = self.hook_sae_recons(SparseDecode.apply(feature_acts, self.W_dec) + self.b_dec)
        sae_out = self.run_time_activation_norm_fn_out(sae_out)
        return self.reshape_fn_out(sae_out, self.d_head)

    def products_are_sparse(self, x: Tensor) -> bool:
        return (
            self.cfg.use_sparse_activations is not False
            and not self.cfg.rescale_acts_by_decoder_norm
            and x.ndim == 2
            and x.device.type == "cpu"
            and self.W_enc.dtype in PRECISE
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
        )


class SparseEncode(Function):
    """Pre-activations of all features, and the k largest of every token after ReLU, as COO."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "tokens d"],
        W_enc: Float[Tensor, "d d_sae"],
        b_enc: Float[Tensor, " d_sae"],
        k: int,
    ) -> tuple[Tensor, Tensor]:
        hidden_pre = (x @ W_enc).add_(b_enc)
        values, features = hidden_pre.topk(k, sorted=False)
        values = values.relu()
        tokens = torch.arange(len(x)).unsqueeze(1).expand_as(features)
        feature_acts = torch.sparse_coo_tensor(
            torch.stack([tokens, features]).flatten(1),
            values.flatten(),
            hidden_pre.shape,
            check_invariants=False,
        )
        ctx.save_for_backward(x, W_enc, features, values > 0)
        ctx.set_materialize_grads(False)
        return feature_acts, hidden_pre

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, W_enc, features, active = ctx.saved_tensors
        grad_acts, grad_pre = grads
        grad_x = grad_W = grad_b = None
        if grad_acts is not None:
            grad = _at(grad_acts, features) * active
            if ctx.needs_input_grad[0]:
                grad_x = rows_by_token(features, grad, W_enc.t())
            grad_W = _rows_by_feature(features, grad, x, W_enc.shape[1]).t()
            grad_b = grad.new_zeros(W_enc.shape[1])
            grad_b.index_add_(0, features.flatten(), grad.flatten())
        if grad_pre is not None:  # an auxiliary loss reads the pre-activations of all features
            dense = (grad_pre @ W_enc.t(), x.t() @ grad_pre, grad_pre.sum(0))
            grad_x, grad_W, grad_b = (
                new if old is None else old + new
                for old, new in zip((grad_x, grad_W, grad_b), dense, strict=True)
            )
        return grad_x, grad_W, grad_b, None


class SparseDecode(Function):
    """`feature_acts @ W_dec` for COO activations with k entries in every row, row by row."""

    @staticmethod
    def forward(
        ctx: Any, feature_acts: Float[Tensor, "tokens d_sae"], W_dec: Float[Tensor, "d_sae d"]
    ) -> Float[Tensor, "tokens d"]:
        indices = feature_acts._indices()
        features = indices[1].view(len(feature_acts), -1)
        values = feature_acts._values().view_as(features)
        ctx.save_for_backward(indices, values, W_dec)
        return rows_by_token(features, values, W_dec)

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        indices, values, W_dec = ctx.saved_tensors
        (grad,) = grads
        features = indices[1].view_as(values)
        grad_acts = grad_W = None
        if ctx.needs_input_grad[0]:
            grad_values = _dot_rows(features, grad, W_dec).flatten()
            shape = (len(values), len(W_dec))
            grad_acts = torch.sparse_coo_tensor(indices, grad_values, shape, check_invariants=False)
        if ctx.needs_input_grad[1]:
            grad_W = _rows_by_feature(features, values, grad, len(W_dec))
        return grad_acts, grad_W


def _has_equal_rows(feature_acts: Tensor) -> bool:
    """Whether a COO matrix lists the same number of entries for each of its rows, in order."""
    tokens = feature_acts._indices()[0]
    n_rows = len(feature_acts)
    if n_rows == 0 or len(tokens) == 0 or len(tokens) % n_rows:
        return False
    return bool((tokens.view(n_rows, -1) == torch.arange(n_rows).unsqueeze(1)).all())


def _at(grad: Tensor, features: Int[Tensor, "tokens k"]) -> Float[Tensor, "tokens k"]:
    """The entries of a gradient, dense or sparse, at each token's features."""
    if not grad.is_sparse:
        return grad.gather(-1, features)
    if torch.equal(grad._indices()[1], features.flatten()):  # as `SparseDecode` returns it
        return grad._values().view_as(features)
    return grad.to_dense().gather(-1, features)


def rows_by_token(
    features: Int[Tensor, "tokens k"],
    weights: Float[Tensor, "tokens k"],
    rows: Float[Tensor, "d_sae d"],
) -> Float[Tensor, "tokens d"]:
    """For every token, the weighted sum of its features' rows."""
    # with strided rows the kernel is a hundred times as slow
    return embedding_bag(features, rows.contiguous(), per_sample_weights=weights, mode="sum")


def _rows_by_feature(
    features: Int[Tensor, "tokens k"],
    weights: Float[Tensor, "tokens k"],
    rows: Float[Tensor, "tokens d"],
    d_sae: int,
) -> Float[Tensor, "d_sae d"]:
    """For every feature, the weighted sum of its tokens' rows."""
    by_feature = features.flatten().argsort(stable=True)
    n_each = features.flatten().bincount(minlength=d_sae)
    return embedding_bag(
        by_feature // features.shape[1],
        rows,
        n_each.cumsum(0) - n_each,
        per_sample_weights=weights.flatten()[by_feature],
        mode="sum",
    )


def _dot_rows(
    features: Int[Tensor, "tokens k"],
    vectors: Float[Tensor, "tokens d"],
    rows: Float[Tensor, "d_sae d"],
) -> Float[Tensor, "tokens k"]:
    """Dot products of every token's vector with its features' rows: `embedding_bag`'s gradient."""
    weights = torch.zeros(features.shape, dtype=rows.dtype, requires_grad=True)
    with torch.enable_grad():
        sums = rows_by_token(features, weights, rows.detach())
    return torch.autograd.grad(sums, weights, vectors)[0]
