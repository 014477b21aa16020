"""Twins of decoder rows against a loop over all pairs of features."""

import math

import pytest
import torch
from support.crosscoders import crosscoder

from sae_lens_route.errors import UserError
from sae_lens_route.evals.agreement import decoder_agreement, largest_cosines


def cosine(a, b):
    dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))


def similar(seed):
    """Crosscoders with rows of many norms; every other row is near one of the first's."""
    sae, generator = crosscoder("topk"), torch.Generator().manual_seed(seed)
    noise = torch.randn(sae.W_dec.shape, generator=generator, dtype=torch.float64)
    rows = sae.W_dec.flip(0) + 0.05 * noise
    rows[::2] = noise[::2]
    sae.W_dec.data = 3 * rows
    return sae


def test_the_share_of_twins_by_brute_force():
    sae, other = crosscoder("topk"), similar(1)
    alive = torch.arange(40) % 3 > 0
    other_alive = torch.arange(40) % 5 > 0
    rows = [row for row, keep in zip(sae.W_dec.tolist(), alive, strict=True) if keep]
    others = [row for row, keep in zip(other.W_dec.tolist(), other_alive, strict=True) if keep]
    largest = [max(cosine(row, o) for o in others) for row in rows]
    result = decoder_agreement(sae, other, alive=alive, other_alive=other_alive)
    assert result.n_features == len(rows) == 26
    assert result.twin_share == sum(c >= 0.7 for c in largest) / len(largest)
    assert 0.2 < result.twin_share < 0.8
    assert result.mean_cosine == pytest.approx(math.fsum(largest) / len(largest), rel=1e-12)
    pieces = largest_cosines(torch.tensor(rows), torch.tensor(others), chunk=7)
    assert pieces.tolist() == pytest.approx(largest, rel=1e-6)
    strict = decoder_agreement(sae, other, threshold=0.99999)
    assert (strict.n_features, strict.twin_share) == (40, 0)
    assert decoder_agreement(sae, sae).twin_share == 1


def test_decoders_that_cannot_be_compared():
    with pytest.raises(UserError, match="widths 24 and 16"):
        decoder_agreement(crosscoder("topk"), crosscoder("topk", layers=2))
    none = torch.zeros(40, dtype=torch.bool)
    with pytest.raises(UserError, match="no feature to compare"):
        decoder_agreement(crosscoder("topk"), crosscoder("topk"), alive=none)
