"""What a dictionary's recovery of concepts is compared with: readers that were not trained.

The dimensions of a residual stream, its principal components, and a dictionary of random directions
in the place of the trained one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sae_lens.saes.sae import SAE
from torch import Tensor

from sae_lens_route.data.reading import ActivationBatch
from sae_lens_route.errors import UserError
from sae_lens_route.evals.concept_tables import DenseTable
from sae_lens_route.saes import (
    RouteTopKSAE,
    RouteTopKSAEConfig,
    TopKCrosscoder,
    TopKCrosscoderConfig,
)
from sae_lens_route.saes.kinds import is_crosscoder
from sae_lens_route.saes.metadata import routed_blocks
from sae_lens_route.saes.routed import unit_rows
from sae_lens_route.saes.router import normalize


class ResidualReader:
    """The d dimensions of n(x) at one block, and their negations.

    It holds 4 d bytes per token: .14 GB for 60,000 tokens at d 576.

    Args:
        name: What its results are called.
        sae: An SAE that reads the block, among others.
        block: The model's block.
    """

    def __init__(self, name: str, sae: Any, block: int) -> None:
        if block not in routed_blocks(sae):
            raise UserError(
                f"{name}: the SAE does not read block {block}; it reads {routed_blocks(sae)}"
            )
        self.name, self.sae, self.block = name, sae, block

    @property
    def saes(self) -> Sequence[Any]:
        return [self.sae]

    def read(self, batch: ActivationBatch) -> Float[Tensor, "tokens d"]:
        streams = batch.activations[..., batch.blocks.index(self.block), :]
        streams = streams[batch.kept]
        return normalize(streams if streams.dtype == torch.float64 else streams.float()).cpu()

    def table(self, parts: Sequence[Float[Tensor, "_ d"]], n_dev: int) -> DenseTable:
        return DenseTable(torch.cat(list(parts)).numpy(), self.block)


class PCAReader(ResidualReader):
    """All d principal components of n(x) at one block on the dev half, and their negations."""

    def table(self, parts: Sequence[Float[Tensor, "_ d"]], n_dev: int) -> DenseTable:
        x = torch.cat(list(parts))
        mean = x[:n_dev].mean(0)
        _, components = torch.linalg.eigh((x[:n_dev] - mean).T.double().cov())
        scores = (x - mean) @ components.flip(-1).to(x.dtype)  # the largest variance first
        return DenseTable(np.ascontiguousarray(scores.numpy()), self.block)


@torch.no_grad()
def random_dictionary(sae: Any, *, k: int | None = None, seed: int = 0) -> SAE[Any]:
    """An SAE like another with random features: decoder rows of unit norm, `W_enc = W_dec.T`.

    It routes as the other does and has its `b_dec`, but no `b_enc`.

    Args:
        sae: A RouteSAE or crosscoder of any architecture.
        k: Active features per token; None means the SAE's own k.
        seed: Of the directions.

    Raises:
        UserError: The SAE's architecture has no k, and none is given.
    """
    k = k if k is not None else getattr(sae.cfg, "k", None)
    if k is None:
        raise UserError(
            f"k=None: a {type(sae).__name__} does not fix the number of active features; give k"
        )
    classes = (
        (TopKCrosscoder, TopKCrosscoderConfig)
        if is_crosscoder(sae)
        else (RouteTopKSAE, RouteTopKSAEConfig)
    )
    shared = {
        field.name: getattr(sae.cfg, field.name)
        for field in fields(classes[1])
        if field.init and hasattr(sae.cfg, field.name)
    }
    random = classes[0](classes[1](**{**shared, "k": int(k)}))
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(random.W_dec.shape, generator=generator, dtype=torch.float64)
    random.W_dec.copy_(unit_rows(rows))
    random.W_enc.copy_(random.W_dec.T)
    random.b_enc.zero_()
    for name in ("b_dec", "W_router", "q_router"):
        if hasattr(sae, name):
            getattr(random, name).copy_(getattr(sae, name))
    return random.to(sae.W_dec.device)
