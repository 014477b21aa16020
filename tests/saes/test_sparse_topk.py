"""The sparse products of TopK training against SAELens's dense ones and finite differences."""

import pytest
import torch
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.topk_sae import TopKTrainingSAE
from torch.autograd import gradcheck

from sae_lens_route.saes import RouteTopKTrainingSAE, RouteTopKTrainingSAEConfig
from sae_lens_route.saes.crosscoder import TopKTrainingCrosscoder, TopKTrainingCrosscoderConfig
from sae_lens_route.saes.sparse_topk import SparseDecode, SparseEncode

D, D_SAE, K, TOKENS = 6, 24, 4, 40


def make(sparse: bool | None, dtype: str = "float64", **options) -> RouteTopKTrainingSAE:
    torch.manual_seed(0)
    cfg = RouteTopKTrainingSAEConfig(
        d_in=D,
        d_sae=D_SAE,
        k=K,
        n_routed_layers=3,
        dtype=dtype,
        use_sparse_activations=sparse,
        decoder_norm_interval=0,
        **options,
    )
    sae = RouteTopKTrainingSAE(cfg)
    with torch.no_grad():  # biases that are not zero, so that some of the k largest are negative
        sae.b_enc.copy_(torch.randn(D_SAE) - 2)
        sae.b_dec.copy_(torch.randn(D) * 0.1)
    return sae


def streams(dtype=torch.float64):
    return torch.randn(TOKENS, 3, D, generator=torch.Generator().manual_seed(1), dtype=dtype)


def a_step(x, dead=None):
    return TrainStepInput(
        sae_in=x,
        coefficients={},
        dead_neuron_mask=dead,
        n_training_steps=1,
        is_logging_step=False,
    )


def gradients(sae, x, dead=None):
    output = sae.training_forward_pass(a_step(x, dead))
    output.loss.backward()
    return output, {name: p.grad for name, p in sae.named_parameters()}


# float64: only the order of the sums differs
SAME = {"rtol": 1e-12, "atol": 1e-13}


@pytest.mark.parametrize("aux", [0.0, 1.0], ids=["no auxiliary loss", "auxiliary loss"])
@pytest.mark.parametrize("routing", ["hard", "soft"])
def test_a_step_is_the_dense_one(routing, aux):
    options = {"routing": routing, "aux_loss_coefficient": aux}
    x, dead = streams(), torch.arange(D_SAE) % 3 == 0
    sparse, of_sparse = gradients(make(True, **options), x, dead)
    dense, of_dense = gradients(make(False, **options), x, dead)
    assert sparse.feature_acts.is_sparse
    assert not dense.feature_acts.is_sparse
    acts = sparse.feature_acts.to_dense()
    assert 0 < (acts > 0).sum() < TOKENS * K  # ReLU takes some of the k away
    assert torch.equal(acts, dense.feature_acts)
    assert torch.equal(sparse.hidden_pre, dense.hidden_pre)
    torch.testing.assert_close(sparse.sae_out, dense.sae_out, **SAME)
    torch.testing.assert_close(sparse.loss, dense.loss, **SAME)
    for name, grad in of_dense.items():
        torch.testing.assert_close(of_sparse[name], grad, **SAME)
        assert grad.abs().max() > 1e-6, name


def test_a_crosscoders_step_is_the_dense_one():
    def trained(sparse):
        torch.manual_seed(2)
        cfg = TopKTrainingCrosscoderConfig(
            d_in=3 * D,
            d_sae=D_SAE,
            k=K,
            n_routed_layers=3,
            dtype="float64",
            use_sparse_activations=sparse,
        )
        return gradients(TopKTrainingCrosscoder(cfg), streams())

    (sparse, of_sparse), (dense, of_dense) = trained(True), trained(False)
    assert sparse.feature_acts.is_sparse
    torch.testing.assert_close(sparse.loss, dense.loss, **SAME)
    for name, grad in of_dense.items():
        torch.testing.assert_close(of_sparse[name], grad, **SAME)


def test_gradients_against_finite_differences():
    """Both products, also through the pre-activations of all features; 1e-6 is gradcheck's own."""
    generator = torch.Generator().manual_seed(3)

    def leaf(*shape):
        numbers = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return numbers.requires_grad_()

    x, W_enc, b_enc, W_dec = leaf(5, D), leaf(D, D_SAE), leaf(D_SAE), leaf(D_SAE, D)

    def autoencode(x, W_enc, b_enc, W_dec):
        feature_acts, hidden_pre = SparseEncode.apply(x, W_enc, b_enc, K)
        return SparseDecode.apply(feature_acts, W_dec), hidden_pre.tanh()

    assert gradcheck(autoencode, (x, W_enc, b_enc, W_dec), atol=1e-6)


def test_the_features_are_those_of_the_saved_sae(tmp_path):
    """Bit for bit, in float32: selection decides by the last bit."""
    sae = make(None, dtype="float32")
    x = torch.randn(500, D, generator=torch.Generator().manual_seed(4))
    sparse, _ = sae.encode_with_hidden_pre(x)
    assert sparse.is_sparse
    dense = TopKTrainingSAE.encode_with_hidden_pre(make(False, dtype="float32"), x)[0]
    assert torch.equal(sae.encode(x), dense)
    assert torch.equal(sparse.to_dense(), dense)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, True),
        ({"dtype": "float32"}, True),
        ({"dtype": "bfloat16"}, False),
        ({"rescale_acts_by_decoder_norm": True}, False),
        ({"sparse": False}, False),
        ({"sparse": True}, True),
    ],
)
def test_what_is_sparse_unless_it_is_said(options, expected):
    sae = make(**{"sparse": None, **options})
    acts, _ = sae.encode_with_hidden_pre(streams(sae.dtype)[:, 0])
    assert acts.is_sparse is expected


def test_the_device_it_runs_on_decides():
    """A runner moves the SAE to another device than that of the configuration."""
    sae = make(None)
    assert sae.cfg.use_sparse_activations is None
    assert sae.products_are_sparse(streams()[:, 0])
    assert not sae.products_are_sparse(torch.empty(4, D, dtype=torch.float64, device="meta"))


def test_where_saelens_takes_over():
    """Hooks on the pre-activations, more axes, and autocast: SAELens's code, the same numbers."""
    x = streams()[:, 0]
    sae, dense = make(True), make(False)
    deeper = x.view(4, 10, D)
    torch.testing.assert_close(
        sae.decode(sae.encode_with_hidden_pre(deeper)[0]),
        dense.decode(dense.encode(deeper)),
        **SAME,
    )

    def without_the_first(value, hook):
        value = value.clone()
        value[:, 0] = -1e3
        return value

    with sae.hooks(fwd_hooks=[("hook_sae_acts_pre", without_the_first)]):
        acts, _ = sae.encode_with_hidden_pre(x)
    assert not acts.to_dense()[:, 0].any()
    assert dense.encode(x)[:, 0].any()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not make(True, dtype="float32").products_are_sparse(x.float())


def test_decoding_what_is_not_k_in_every_row():
    """A COO matrix with other entries goes to SAELens, with the same result as a dense one."""
    sae = make(True)
    acts = torch.zeros(TOKENS, D_SAE, dtype=torch.float64)
    acts[0, :3], acts[5, 7], acts[6, 2] = 1.0, 2.0, 3.0
    torch.testing.assert_close(sae.decode(acts.to_sparse()), sae.decode(acts), **SAME)
    empty = torch.zeros(0, D_SAE, dtype=torch.float64)
    assert sae.decode(empty.to_sparse()).shape == (0, D)
