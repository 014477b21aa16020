"""The active entries are those of a plain loop, for dense and sparse activations."""

import pytest
import torch

from sae_lens_route.features.active import active_entries


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparse", [False, True])
def test_active_entries_equal_plain_loop(dtype, sparse):
    acts = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    acts[acts.abs() < 0.5] = 0  # a silent feature is 0, not negative
    expected = [
        (5 * b + s, f, acts[b, s, f].item())
        for b in range(3)
        for s in range(5)
        for f in range(7)
        if acts[b, s, f] > 0
    ]
    token, feature, value = active_entries(acts.to_sparse() if sparse else acts)
    assert list(zip(token.tolist(), feature.tolist(), value.tolist(), strict=True)) == expected
