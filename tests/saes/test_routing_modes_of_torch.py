"""Routing under torch's own modes: inference mode, autocast, torch.compile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.architectures import ARCHITECTURES, a_step, random_sae, random_streams

OPTIONS = {
    "hard": {},
    "attention": {"aggregation": "attention"},
    "soft": {"routing": "soft"},
    "uniform": {"routing": "uniform"},
    "shares": {"routing": "uniform", "route_shares": [0.5, 0.2, 0.3]},
}
every_routing = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def single_precision(architecture="topk", **options):
    sae = random_sae(architecture, **options).float()
    sae.dtype, sae.cfg.dtype = torch.float32, "float32"
    return sae


@every_routing
def test_inference_mode_has_the_same_bits_and_leaves_nothing_behind(options):
    x = random_streams(32)
    expected = random_sae("topk", **options).route(x)
    sae = random_sae("topk", **options)
    with torch.inference_mode():
        found = sae.route(x.clone())
        sae.encode_layers(x.clone())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    # a step afterwards: nothing that inference mode made is used where gradients are needed
    sae.training_forward_pass(a_step(x)).loss.backward()
    assert torch.isfinite(sae.W_dec.grad).all()


@every_routing
def test_autocast_routes_as_full_precision_does(options):
    """Products have 8 bits in bfloat16: p is off by up to 2^-7, a route only where it is close."""
    x = random_streams(64).float()
    expected = single_precision(**options).route(x)
    sae = single_precision(**options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sae.route(x)
    torch.testing.assert_close(found.probs.float(), expected.probs, rtol=0, atol=2**-5)
    assert torch.equal(found.mean, expected.mean)
    assert torch.equal(found.scale, expected.scale)
    top = expected.probs.topk(2).values
    clear = top[:, 0] - top[:, 1] > 2**-4
    if options.get("routing") != "uniform":
        assert clear.sum() > 32
        assert torch.equal(found.route[clear], expected.route[clear])
    else:
        assert torch.equal(found.route, expected.route)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("objective", ["reconstruction", "assignment"])
def test_a_training_step_under_autocast(architecture, objective):
    """Within 5 % of the loss in full precision; gradients finite and in the weights' dtype."""
    x = random_streams(64).float()
    expected = single_precision(architecture, router_objective=objective)
    sae = single_precision(architecture, router_objective=objective)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = sae.training_forward_pass(a_step(x))
    output.loss.backward()
    loss = expected.training_forward_pass(a_step(x)).loss
    assert output.loss.item() == pytest.approx(loss.item(), rel=0.05)
    for name, parameter in sae.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.dtype == torch.float32, name
            assert torch.isfinite(parameter.grad).all(), name


COMPILED = """
import torch
from support.architectures import a_step, random_sae, random_streams

for options in ({}, {"aggregation": "attention"}, {"routing": "soft"}):
    sae, x = random_sae("topk", **options), random_streams(32)
    compiled = torch.compile(sae.route, backend="eager", fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(compiled(x), sae.route(x), strict=True)), options
    print(options, "one graph")

for architecture in ("topk", "matryoshka_batchtopk", "jumprelu", "gated"):
    torch.compiler.reset()
    eager, sae, x = random_sae(architecture), random_sae(architecture), random_streams(32)
    step = torch.compile(sae.training_forward_pass, backend="aot_eager")
    found, expected = step(a_step(x)).loss, eager.training_forward_pass(a_step(x)).loss
    torch.testing.assert_close(found, expected)
    found.backward(), expected.backward()
    for (name, parameter), same in zip(sae.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, same.grad, msg=name)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    print(architecture, "step")
"""


def test_compiled_routing_and_steps_compute_the_same():
    """Routing is one graph with the same bits; a step (`compile_sae`) is equal to a relative 1e-7.

    In a process of its own, because these tests check types at run time, which cannot be traced.
    """
    tests = str(Path(__file__).parents[1])
    ran = subprocess.run(
        [sys.executable, "-c", COMPILED],
        env={**os.environ, "PYTHONPATH": tests},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert (ran.stdout.count("one graph"), ran.stdout.count("step")) == (3, 4), ran.stderr
