"""What is computed without reading from the device is what SAELens's method computes."""

import pytest
import torch
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.topk_sae import TopKTrainingSAE
from support.architectures import a_step, random_sae
from support.devices import place_module, placed, pretend_gpus

from sae_lens_route.saes.asynchronous import dead_feature_loss

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


AUXILIARY = {
    "topk": ("topk", {}),
    "batchtopk": ("batchtopk", {}),
    "matryoshka": ("matryoshka_batchtopk", {}),
    "matryoshka by level": ("matryoshka_batchtopk", {"use_matryoshka_aux_loss": True}),
}
DEAD = {
    "none dead": torch.zeros(12, dtype=torch.bool),
    "one dead": torch.arange(12) == 7,
    "some dead": torch.arange(12) % 4 == 1,
    "all dead": torch.ones(12, dtype=torch.bool),
}


def loss_and_gradients(sae, name, x, dead):
    """The loss `name` of a step, which SAELens's own methods compute on the CPU."""
    h = sae.encode_with_hidden_pre(x)[1]
    acts, out = h.relu(), h.relu() @ sae.W_dec
    loss = sae.calculate_aux_loss(a_step(x, dead), acts, h, out)[name]
    if loss.requires_grad:
        loss.backward()
    return loss.detach(), {name: p.grad for name, p in sae.named_parameters()}


def require_saelens_loss(make_sae, name, dead):
    """On a GPU that is not there: nothing is waited for, and loss and gradients are SAELens's."""
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)).double()
    theirs, their_gradients = loss_and_gradients(make_sae(), name, x, dead)
    sae = make_sae()
    place_module(sae, "meta:0")
    with pretend_gpus() as waits:
        ours, gradients = loss_and_gradients(sae, name, placed(x, "meta:0"), placed(dead, "meta:0"))
    assert waits == {}
    assert (theirs > 0) == dead.any()
    torch.testing.assert_close(ours.values, theirs, rtol=1e-12, atol=0)
    for parameter, gradient in gradients.items():
        expected = their_gradients[parameter]
        found = None if gradient is None else gradient.values
        if expected is None and found is not None:  # SAELens's loss is a constant then
            expected = torch.zeros_like(found)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15, msg=parameter)


@pytest.mark.parametrize("dead", DEAD.values(), ids=DEAD)
@pytest.mark.parametrize("architecture, options", AUXILIARY.values(), ids=AUXILIARY)
@pytest.mark.parametrize("rescale", [False, True])
def test_the_auxiliary_loss(architecture, options, rescale, dead):
    options = {**options, "rescale_acts_by_decoder_norm": rescale, "aux_loss_coefficient": 1 / 32}
    require_saelens_loss(
        lambda: random_sae(architecture, **options), "auxiliary_reconstruction_loss", dead
    )


@pytest.mark.parametrize("dead", DEAD.values(), ids=DEAD)
def test_the_loss_of_dead_preactivations(dead):
    require_saelens_loss(
        lambda: random_sae("jumprelu", pre_act_loss_coefficient=1 / 32), "pre_act_loss", dead
    )


@pytest.mark.parametrize("architecture", ["topk", *KINDS])
def test_the_auxiliary_loss_without_a_mask(architecture):
    sae = random_sae(architecture, aux_loss_coefficient=0.5)
    x, h = torch.randn(20, 6).double(), torch.randn(20, 12).double()
    ours = sae.calculate_topk_aux_loss(x, x + 1, h, None)
    theirs = TopKTrainingSAE.calculate_topk_aux_loss(sae, x, x + 1, h, None)
    assert torch.equal(ours, theirs)
    assert (ours.dtype, ours.requires_grad) == (theirs.dtype, theirs.requires_grad)


@pytest.mark.parametrize("dead", DEAD.values(), ids=DEAD)
def test_the_gradient_of_the_auxiliary_loss(dead):
    """Against finite differences."""
    generator = torch.Generator().manual_seed(0)
    error, h, W_dec = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in [(5, 6), (5, 12), (12, 6)]
    )
    h.requires_grad_(), W_dec.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, W_dec: dead_feature_loss(error, h, dead, W_dec), (h, W_dec)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_auxiliary_loss_keeps_its_type(dtype):
    error, h, W_dec = (torch.ones(shape, dtype=dtype) for shape in [(5, 6), (5, 12), (12, 6)])
    assert dead_feature_loss(error, h, DEAD["one dead"], W_dec).dtype == dtype
