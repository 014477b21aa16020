"""A stream that is constant over d has nothing to reconstruct: its loss is 0, not 0/0.

In training it must not turn a step into NaN; everywhere else nothing changes by a bit.
"""

import pytest
import torch
from support.architectures import ARCHITECTURES, a_step, random_sae, random_streams
from support.devices import place_module, placed, pretend_gpus
from support.splice import hooked_model, route_sae, some_tokens

from sae_lens_route import saes
from sae_lens_route.evals.reconstruction import CrosscoderSums, ReconstructionSums
from sae_lens_route.saes.loss import NEGLIGIBLE, norm_mse, normalized_mse
from sae_lens_route.saes.router import normalization_stats
from sae_lens_route.splice import attach

TOKENS, BLOCKS, D = 32, 3, 6
OPTIONS = {
    "hard": {},
    "mean": {"aggregation": "mean"},
    "attention": {"aggregation": "attention"},
    "soft": {"routing": "soft"},
    "uniform": {"routing": "uniform"},
    "shares": {"routing": "uniform", "route_shares": [0.5, 0.2, 0.3]},
    "assignment": {"router_objective": "assignment"},
    "mse": {"loss": "mse"},
    "auxiliary": {"aux_loss_coefficient": 0.5},
}
CONSTANT = [0.0, 0.5, 0.1, 1e-30, 1e6]
"""The third is not exactly the mean of six of it."""
WHERE = {"one token": 3, "one block": (slice(None), 1), "everything": slice(None)}


def streams_with_constants(value, where):
    """Streams of which one block's, or all, of some tokens or of all are constant."""
    x = random_streams(TOKENS).float()
    x[WHERE[where]] = value
    return x


def every_architecture_and_option():
    for architecture, (_, defaults, _) in ARCHITECTURES.items():
        for name, options in OPTIONS.items():
            if name != "auxiliary" or "k" in defaults:
                yield pytest.param(architecture, options, id=f"{architecture}, {name}")


def step(sae, x):
    dead = torch.arange(12) < 4
    output = sae.training_forward_pass(a_step(x, dead=dead))
    output.loss.backward()
    return output


def assert_finite(sae, output):
    assert all(torch.isfinite(loss).all() for loss in output.losses.values())
    gradients = {name: p.grad for name, p in sae.named_parameters() if p.grad is not None}
    assert "W_dec" in gradients
    for name, gradient in gradients.items():
        assert torch.isfinite(gradient).all(), name


@pytest.mark.parametrize(("architecture", "options"), every_architecture_and_option())
@pytest.mark.parametrize("where", WHERE)
def test_loss_and_gradients_are_finite(architecture, options, where):
    sae = random_sae(architecture, **options).float()
    sae.cfg.dtype, sae.dtype = "float32", torch.float32
    for value in CONSTANT:
        sae.zero_grad()
        assert_finite(sae, step(sae, streams_with_constants(value, where)))


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("value", CONSTANT)
@pytest.mark.parametrize("kind", ["multi_layer_topk", "crosscoder", "crosscoder_topk"])
def test_stacked_architectures(kind, where, value):
    torch.manual_seed(0)
    sizes = {"d_sae": 12, "n_routed_layers": BLOCKS}
    if kind == "multi_layer_topk":
        sae = saes.MultiLayerTopKTrainingSAE(
            saes.MultiLayerTopKTrainingConfig(d_in=D, k=3, **sizes)
        )
    elif kind == "crosscoder":
        sae = saes.TrainingCrosscoder(saes.TrainingCrosscoderConfig(d_in=BLOCKS * D, **sizes))
    else:
        sae = saes.TopKTrainingCrosscoder(
            saes.TopKTrainingCrosscoderConfig(d_in=BLOCKS * D, k=3, **sizes)
        )
    assert_finite(sae, step(sae, streams_with_constants(value, where)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_on_other_devices_too(architecture):
    """Their formula of the scale is another one: a variance's square root."""
    sae = random_sae(architecture)
    place_module(sae, "meta:0")
    x = random_streams(TOKENS)
    x[3] = 0.5
    with pretend_gpus():
        output = sae.training_forward_pass(a_step(placed(x, "meta:0")))
        output.loss.backward()
    assert torch.isfinite(output.loss.detach().values)
    for name, parameter in sae.named_parameters():
        if parameter.grad is not None:
            assert torch.isfinite(parameter.grad.values).all(), name


def test_a_constant_token_adds_nothing_to_the_loss():
    """The mean is over all tokens, so n tokens and one constant have n / (n + 1) of the loss."""
    sae, x = random_sae("topk"), random_streams(TOKENS)
    loss = sae.training_forward_pass(a_step(x)).loss
    with_constant = torch.cat([x, torch.full_like(x[:1], 0.5)])
    found = sae.training_forward_pass(a_step(with_constant)).loss
    assert found.item() == pytest.approx(loss.item() * TOKENS / (TOKENS + 1), rel=1e-12)


@pytest.mark.parametrize("size", [1e-5, 1.0, 1e3])
def test_any_other_token_has_the_bits_of_the_quotient(size):
    generator = torch.Generator().manual_seed(0)
    preds = torch.randn(50, 8, generator=generator, requires_grad=True)
    target = (torch.randn(50, 8, generator=generator) * size).requires_grad_()
    ours = normalized_mse(preds, target)
    plain = (preds - target).pow(2) / target.pow(2).sum(dim=-1, keepdim=True)
    assert torch.equal(ours, plain)
    for a, b in zip(
        torch.autograd.grad(ours.sum(), (preds, target)),
        torch.autograd.grad(plain.sum(), (preds, target)),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_the_boundary_and_what_is_not_a_number():
    target = torch.tensor([[1.1e-6, 0.0], [0.9e-6, 0.0], [torch.nan, 1.0], [0.0, 0.0]])
    error = norm_mse(torch.ones(4, 2), target.requires_grad_())
    assert error[0].item() == pytest.approx(2 / 1.1e-6**2, rel=1e-4)
    assert NEGLIGIBLE > 0.9e-6**2
    assert error[1] == 0
    assert error[3] == 0
    assert error[2].isnan()
    error[[0, 1, 3]].sum().backward()
    assert torch.isfinite(target.grad[[0, 1, 3]]).all()
    assert (target.grad[[1, 3]] == 0).all()


@pytest.mark.parametrize("device", ["cpu", "meta:0"])
def test_the_scale_of_a_constant_has_a_finite_gradient(device):
    x = torch.randn(4, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[1] = 0.5
    reference = x[[0, 2, 3]].clone().requires_grad_()
    reference.std(-1).sum().backward()
    x = x.requires_grad_() if device == "cpu" else placed(x, device).requires_grad_()
    with pretend_gpus():
        _, scale = normalization_stats(x)
        scale.sum().backward()
    gradient = x.grad if device == "cpu" else x.grad.values
    assert (gradient[1] == 0).all()
    torch.testing.assert_close(gradient[[0, 2, 3]], reference.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("routing", ["hard", "soft", "uniform"])
def test_metrics_are_finite(routing):
    sae = random_sae("topk", routing=routing)
    sae.cfg.metadata.routed_blocks = [0, 1, 2]
    x = random_streams(TOKENS)
    x[3], x[5, 1] = 0.5, 0.5
    sums = ReconstructionSums(sae)
    with torch.no_grad():
        sums.add(x)
    for name, total in sums.totals.items():
        assert torch.isfinite(total).all(), name


def test_metrics_of_a_crosscoder_are_finite():
    config = saes.TrainingCrosscoderConfig(d_in=BLOCKS * D, d_sae=12, n_routed_layers=BLOCKS)
    sae = saes.TrainingCrosscoder(config)
    sae.cfg.metadata.routed_blocks = [0, 1, 2]
    x = random_streams(TOKENS).float()
    x[3], x[5, 1] = 0.5, 0.5
    sums = CrosscoderSums(sae)
    with torch.no_grad():
        sums.add(x)
    assert all(torch.isfinite(total).all() for total in sums.totals.values())


@pytest.mark.parametrize("unscaled", [False, True])
def test_a_splice_at_a_constant_stream_is_finite(unscaled):
    model, sae = hooked_model("llama"), route_sae([2, 4, 5])
    model.embed.W_E.data[7] = 0.0
    for block in model.blocks:
        for name, parameter in block.named_parameters():
            if name.endswith(("W_O", "W_out", "b_O", "b_out")):
                parameter.data.zero_()  # every stream is its token's embedding
    tokens = some_tokens()
    tokens[0, 3] = 7
    with torch.no_grad(), attach(model, sae, unscaled=unscaled) as hook:
        logits = model.run_with_hooks(
            tokens, fwd_hooks=[(hook.name, lambda value, hook: sae.decode(sae.encode(value)))]
        )
        assert hook.routing.scale[0, 3].tolist() == [1e-6] * 3
    assert torch.isfinite(logits).all()
