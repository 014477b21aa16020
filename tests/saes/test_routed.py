"""The training pass of RouteSAEs: gradients, penalties, what each option trains, and metrics."""

import math

import pytest
import torch
from sae_lens.saes.sae import SAEMetadata
from support.architectures import (
    ARCHITECTURES,
    a_step,
    decode_by_hand,
    encode_by_hand,
    every_architecture,
    random_sae,
    random_streams,
    structured_streams,
    train,
    training_config,
)

from sae_lens_route.saes.inference import to_inference

OBJECTIVES = ["reconstruction", "assignment", "frozen"]


def smooth_region(sae, x):
    """Everything that jumps: the chosen routes, the active features, and the gates."""
    routing = sae.route(x)
    parts = [routing.route, sae.encode(routing.x_route) > 0]
    if hasattr(sae, "b_gate"):
        parts.append((routing.x_route - sae.b_dec) @ sae.W_enc + sae.b_gate > 0)
    return torch.cat([part.flatten().long() for part in parts])


@every_architecture
@pytest.mark.parametrize("routing", ["hard", "soft"])
def test_gradients_of_the_whole_loss(architecture, routing):
    """Every entry of every parameter against central differences, in float64.

    At a step of 1e-6 their own error is about 1e-9 (rounding over the step); 1e-7 is allowed. None
    of the perturbations may cross a jump. The threshold of JumpReLU is left out: its gradient is a
    straight-through estimate by design.
    """
    aggregation = "attention" if routing == "soft" else "sum"
    sae = random_sae(architecture, routing=routing, aggregation=aggregation)
    x = random_streams(7)
    step, region = 1e-6, smooth_region(sae, x)
    assert (sae.route(x).route.bincount(minlength=3) > 0).sum() >= 2
    sae.training_forward_pass(a_step(x)).loss.backward()

    def loss():
        assert torch.equal(smooth_region(sae, x), region)
        return float(sae.training_forward_pass(a_step(x)).loss)

    checked = set()
    for name, parameter in sae.named_parameters():
        if name == "threshold":
            continue
        flat, numeric = parameter.data.view(-1), torch.zeros(parameter.numel()).double()
        with torch.no_grad():
            for i in range(len(flat)):
                here = float(flat[i])
                flat[i] = here + step
                above = loss()
                flat[i] = here - step
                numeric[i] = (above - loss()) / (2 * step)
                flat[i] = here
        torch.testing.assert_close(
            parameter.grad.view(-1),
            numeric,
            rtol=1e-6,
            atol=1e-7,
            msg=lambda m, n=name: f"{n}: {m}",
        )
        assert numeric.abs().max() > 1e-4, name
        checked.add(name)
    assert checked > {"W_router", "W_enc", "W_dec", "b_dec"}


def dead_features(d_sae=12):
    return torch.arange(d_sae) % 3 == 0


PENALTIES = {
    "standard": ("l1_loss", {}),
    "gated": ("l1_loss", {}),
    "gated, second path": ("auxiliary_reconstruction_loss", {}),
    "topk": ("auxiliary_reconstruction_loss", {"aux_loss_coefficient": 1.0}),
    "batchtopk": ("auxiliary_reconstruction_loss", {"aux_loss_coefficient": 1.0}),
    "matryoshka_batchtopk": ("auxiliary_reconstruction_loss", {"aux_loss_coefficient": 1.0}),
    "matryoshka_batchtopk, by level": (
        "auxiliary_reconstruction_loss",
        {"aux_loss_coefficient": 1.0, "use_matryoshka_aux_loss": True},
    ),
}


def penalty(sae, x_route, name):
    acts, pre = sae.encode_with_hidden_pre(x_route)
    step = a_step(x_route, dead_features())
    return sae.calculate_aux_loss(step, acts, pre, sae.decode(acts))[name]


@pytest.mark.parametrize("case", PENALTIES)
@pytest.mark.parametrize("grad", [True, False])
def test_penalties_do_not_depend_on_the_scale_of_x_route(case, grad):
    name, options = PENALTIES[case]
    architecture = case.split(",")[0]
    sae = random_sae(architecture, **options)
    raw = random_sae(architecture, loss="mse", **options)
    with torch.no_grad():
        for parameter_name, parameter in [*sae.named_parameters(), *raw.named_parameters()]:
            if parameter_name.startswith("b_"):
                parameter.zero_()
    x_route = random_sae(architecture).route(random_streams(20)).x_route.detach()
    with torch.set_grad_enabled(grad):
        value = penalty(sae, x_route, name)
        assert value > 1e-3
        for scale in (1e-3, 0.1, 7.0, 1e4):
            torch.testing.assert_close(penalty(sae, scale * x_route, name), value)
        # and the unit is the mean norm, or the mean squared norm, of x_route
        norm = x_route.norm(dim=-1)
        unit = norm.mean() if name == "l1_loss" else (norm**2).mean()
        torch.testing.assert_close(value, penalty(raw, x_route, name) / unit)
        # in SAELens's units, shrinking x_route pays
        assert penalty(raw, 0.1 * x_route, name) < 0.11 * penalty(raw, x_route, name)


def test_a_penalty_does_not_reward_the_router_for_shrinking_p():
    """The gradient of ReLU's L1 loss (no biases) is orthogonal to x_route, all tokens together."""
    sae = random_sae("standard")
    with torch.no_grad():
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    x_route = sae.route(random_streams(20)).x_route.detach().requires_grad_()
    penalty(sae, x_route, "l1_loss").backward()
    along = (x_route.grad * x_route).sum()
    assert along.abs() < 1e-12 < x_route.grad.abs().max()


@every_architecture
@pytest.mark.parametrize("aggregation", ["sum", "attention"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_each_objective_trains(architecture, aggregation, objective):
    torch.manual_seed(0)
    options = {"router_objective": objective, "aggregation": aggregation}
    sae = ARCHITECTURES[architecture][0](
        training_config(architecture, d_in=24, d_sae=48, n_routed_layers=3, **options)
    )
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    train(sae, structured_streams(8 * 64, seed=0).split(64))
    router = {"W_router"} | ({"q_router"} if aggregation == "attention" else set())
    for name in router:
        assert torch.equal(sae.state_dict()[name], before[name]) == (objective == "frozen"), name
    for name in ("W_enc", "W_dec", "b_dec"):
        assert not torch.equal(sae.state_dict()[name], before[name]), name


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "gated"])
def test_without_latent_bias(architecture):
    """As in Equation 10: b_enc stays at its 0, everything else is trained."""
    torch.manual_seed(0)
    sae = ARCHITECTURES[architecture][0](
        training_config(architecture, d_in=24, d_sae=48, n_routed_layers=3, latent_bias=False)
    )
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    train(sae, structured_streams(8 * 64, seed=0).split(64))
    assert not sae.b_enc.any()
    for name in ("W_router", "W_enc", "W_dec", "b_dec"):
        assert not torch.equal(sae.state_dict()[name], before[name]), name


@every_architecture
@pytest.mark.parametrize("routing", ["hard", "uniform"])
def test_route_errors_token_by_token(architecture, routing):
    sae = to_inference(random_sae(architecture, routing=routing))
    x = random_streams(15)
    routed = sae.route(x)
    table = torch.zeros(15, 3, dtype=torch.float64)
    for t, token in enumerate(x):
        n = [(h - h.mean()) / (((h - h.mean()) ** 2).sum() / 5) ** 0.5 for h in token]
        p = torch.softmax(sum(n) @ sae.W_router, 0).max() if routing == "hard" else 1.0
        for i in range(3):
            target = p * n[i]
            error = decode_by_hand(sae, encode_by_hand(sae, target)) - target
            table[t, i] = error @ error / (target @ target)
    # the loop leaves out the 1e-6 added to the standard deviation
    torch.testing.assert_close(sae.route_errors(x, routed), table, rtol=1e-4, atol=1e-5)
    own = sae.route_errors(x, routed).gather(1, routed.route[:, None]).squeeze(1)
    x_hat = sae(routed.x_route)
    by_route = (x_hat - routed.x_route).pow(2).sum(-1) / routed.x_route.pow(2).sum(-1)
    torch.testing.assert_close(own, by_route, rtol=1e-9, atol=1e-12)
    # any leading shape
    again = sae.route_errors(x.view(3, 5, 3, 6), sae.route(x.view(3, 5, 3, 6)))
    if routing == "hard":
        torch.testing.assert_close(again.flatten(0, 1), sae.route_errors(x, routed))


def test_route_metrics_name_the_blocks():
    sae, x = random_sae("topk"), random_streams(40)
    sae.cfg.metadata = SAEMetadata(routed_blocks=[2, 5, 9])
    metrics = sae.training_forward_pass(a_step(x)).metrics
    routing = sae.route(x)
    for route, block in enumerate([2, 5, 9]):
        share = float((routing.route == route).double().mean())
        assert float(metrics[f"route_share/block_{block}"]()) == pytest.approx(share, abs=1e-6)
    assert float(metrics["route_weight"]()) == pytest.approx(float(routing.weight.mean()))
    p = routing.probs.mean(0).tolist()
    entropy = -sum(q * math.log(q) for q in p)
    assert float(metrics["route_entropy"]()) == pytest.approx(entropy)

    sae.cfg.metadata = SAEMetadata()
    names = sae.training_forward_pass(a_step(x)).metrics
    assert {f"route_share/route_{route}" for route in range(3)} < set(names)
