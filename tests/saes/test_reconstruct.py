"""Reconstruction with sparse products against `decode(encode(x))`, and where it falls back."""

import pytest
import torch
from support.architectures import every_architecture, random_sae, random_streams

from sae_lens_route.saes import reconstruct as room
from sae_lens_route.saes.inference import to_inference
from sae_lens_route.saes.reconstruct import reconstruct, reconstruct_and_count

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Relative: sums of k products in another order."""


def inputs(sae, tokens=37):
    with torch.no_grad():
        return sae.route(random_streams(tokens).to(sae.dtype)).x_route


@pytest.mark.parametrize("dtype", TOLERANCE)
@every_architecture
def test_is_decode_of_encode(architecture, dtype, monkeypatch):
    sae = to_inference(random_sae(architecture)).to(dtype)
    x = inputs(sae)
    with torch.no_grad():
        acts = sae.encode(x)
        expected = sae.decode(acts)
        monkeypatch.setattr(room, "_PIECE", 5 * sae.cfg.d_sae)  # pieces of five tokens
        x_hat, n_active = reconstruct_and_count(sae, x)
        tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
        torch.testing.assert_close(x_hat, expected, **tolerance)
        torch.testing.assert_close(reconstruct(sae, x.view(1, *x.shape))[0], expected, **tolerance)
    assert torch.equal(n_active, (acts != 0).sum(0)) and 0 < n_active.sum() < acts.numel()


def test_only_topk_is_sparse_and_only_where_nobody_watches():
    sae = to_inference(random_sae("topk"))
    assert room._is_topk(sae)
    assert not room._is_topk(to_inference(random_sae("jumprelu")))
    assert not room._is_topk(random_sae("topk")), "one in training may couple tokens"
    assert not room._is_topk(to_inference(random_sae("topk")).to(torch.bfloat16))
    point = sae.hook_sae_acts_post
    for register in (point.register_forward_hook, point.register_forward_pre_hook):
        handle = register(lambda *_: None)
        assert not room._is_topk(sae)
        handle.remove()
        assert room._is_topk(sae)


def test_a_hook_on_the_activations_acts():
    sae = to_inference(random_sae("topk"))
    x = inputs(sae)
    sae.hook_sae_acts_post.register_forward_hook(lambda _module, _args, acts: 0 * acts)
    with torch.no_grad():
        assert torch.equal(reconstruct(sae, x), sae.b_dec.expand_as(x))


def test_no_tokens():
    sae = to_inference(random_sae("topk"))
    x_hat, n_active = reconstruct_and_count(sae, inputs(sae)[:0])
    assert x_hat.shape == (0, sae.cfg.d_in) and n_active.sum() == 0
