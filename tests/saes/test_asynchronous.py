"""What is computed without reading from the device is bit-identical to SAELens's method."""

import pytest
import torch
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.topk_sae import TopKTrainingSAE
from support.architectures import random_sae

KINDS = ["batchtopk", "matryoshka_batchtopk"]
ACTS = {
    "some active": lambda g: torch.randn(20, 12, generator=g).relu(),
    "none active": lambda g: torch.zeros(20, 12),
    "negative": lambda g: -torch.rand(20, 12, generator=g),
    "nan": lambda g: torch.randn(20, 12, generator=g).index_fill(1, torch.tensor([3]), torch.nan),
    "all inf": lambda g: torch.full((20, 12), torch.inf),
    "denormal": lambda g: torch.rand(20, 12, generator=g) * 1e-42,
}


@pytest.mark.parametrize("architecture", KINDS)
@pytest.mark.parametrize("acts", ACTS.values(), ids=ACTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_threshold(architecture, acts, dtype):
    generator = torch.Generator().manual_seed(0)
    ours, theirs = random_sae(architecture), random_sae(architecture)
    for _ in range(3):
        batch = acts(generator).to(dtype)
        ours.update_topk_threshold(batch)
        BatchTopKTrainingSAE.update_topk_threshold(theirs, batch)
        assert ours.topk_threshold.dtype == theirs.topk_threshold.dtype == torch.float64
        assert torch.equal(ours.topk_threshold, theirs.topk_threshold)


def test_the_threshold_under_autocast():
    acts = torch.rand(20, 12, generator=torch.Generator().manual_seed(0))
    ours, theirs = random_sae("batchtopk"), random_sae("batchtopk")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours.update_topk_threshold(acts)
        BatchTopKTrainingSAE.update_topk_threshold(theirs, acts)
    assert torch.equal(ours.topk_threshold, theirs.topk_threshold)


@pytest.mark.parametrize("architecture", ["topk", *KINDS])
@pytest.mark.parametrize("dead", [None, torch.arange(12) < 4], ids=["no mask", "four dead"])
def test_the_auxiliary_loss(architecture, dead):
    generator = torch.Generator().manual_seed(0)
    sae = random_sae(architecture, aux_loss_coefficient=0.5)
    x, x_hat = (torch.randn(20, 6, generator=generator).double() for _ in range(2))
    arguments = (x, x_hat, torch.randn(20, 12, generator=generator).double(), dead)
    ours, theirs = (
        sae.calculate_topk_aux_loss(*arguments),
        TopKTrainingSAE.calculate_topk_aux_loss(sae, *arguments),
    )
    assert torch.equal(ours, theirs)
    assert ours.dtype == theirs.dtype
    assert ours.requires_grad == theirs.requires_grad
    assert (ours > 0) == (dead is not None)
