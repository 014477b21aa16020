"""The objective that teaches the router: its loss, the gradients, and the balanced assignment."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from support.architectures import (
    a_step,
    decode_by_hand,
    encode_by_hand,
    every_architecture,
    random_sae,
    random_streams,
)

from sae_lens_route.saes.assignment import balanced_assignment
from sae_lens_route.saes.inference import to_inference
from sae_lens_route.saes.router import normalize

SEED = st.integers(0, 2**31)
CHECKED = settings(max_examples=50, deadline=None)


def by_numpy(sae, x, temperature):
    """Cross entropy of p against the balanced assignment, with nothing of the package but weights.

    In numpy, token by token and block by block, Sinkhorn in its multiplicative form.
    """
    inference = to_inference(sae).requires_grad_(False)
    W_router = sae.W_router.detach().numpy()
    probs, errors = [], []
    for token in x.numpy()[::4]:
        n = [(h - h.mean()) / (h.std(ddof=1) + 1e-6) for h in token]
        logits = sum(n) @ W_router
        p = np.exp(logits - logits.max())
        p /= p.sum()
        row = []
        for h in n:
            target = torch.from_numpy(h * (p.max() if sae.cfg.scale_by_probability else 1))
            x_hat = decode_by_hand(inference, encode_by_hand(inference, target))
            row.append(float(((x_hat - target) ** 2).sum() / (target**2).sum()))
        probs.append(p)
        errors.append(row)
    probs, errors = np.array(probs), np.array(errors)
    kernel = np.exp(-errors / errors.mean() / temperature)
    v = np.ones(errors.shape[1])
    for _ in range(20):
        u = 1 / (kernel @ v)
        v = v / (v * (kernel.T @ u) * len(v) / len(u))
    target = kernel * v / (kernel @ v)[:, None]
    return -(target * np.log(probs)).sum(1).mean(), target, probs


# whose training encoder looks at each token alone, so that a token-by-token loop can follow it
ALONE = ["topk", "jumprelu", "standard", "gated"]


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("architecture", ALONE)
def test_assignment_loss(architecture, scale):
    sae = random_sae(architecture, router_objective="assignment", scale_by_probability=scale)
    x = random_streams(43)
    output = sae.training_forward_pass(a_step(x))
    expected, target, probs = by_numpy(sae, x, temperature=0.2)
    assert float(output.losses["assignment_loss"]) == pytest.approx(expected, rel=1e-9)
    others = [loss for name, loss in output.losses.items() if name != "assignment_loss"]
    assert float(output.loss) == pytest.approx(expected + float(sum(others)), rel=1e-12)

    output.losses["assignment_loss"].backward(retain_graph=True)
    for name, parameter in sae.named_parameters():
        assert (parameter.grad is None) == (name != "W_router"), name
    # the gradient of a cross entropy at its logits is p - target
    pooled = normalize(x[::4]).sum(1)
    by_hand = pooled.T @ torch.from_numpy(probs - target) / len(pooled)
    torch.testing.assert_close(sae.W_router.grad, by_hand, rtol=1e-8, atol=1e-10)


@every_architecture
def test_under_assignment_the_reconstruction_does_not_reach_the_router(architecture):
    sae = random_sae(architecture, router_objective="assignment", aggregation="attention")
    output = sae.training_forward_pass(a_step(random_streams(40)))
    rest = [loss for name, loss in output.losses.items() if name != "assignment_loss"]
    sum(rest).backward(retain_graph=True)
    assert sae.W_router.grad is None and sae.q_router.grad is None
    assert sae.W_enc.grad.abs().max() > 0 and sae.W_dec.grad.abs().max() > 0
    dictionary = {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}
    output.losses["assignment_loss"].backward()
    assert sae.W_router.grad.abs().max() > 0 and sae.q_router.grad.abs().max() > 0
    for name, gradient in dictionary.items():
        assert torch.equal(dict(sae.named_parameters())[name].grad, gradient), name


# --- balanced assignment --------------------------------------------------------------------------

# with a token or two per block the iteration can take thousands of rounds: 1.2 % off after 20
COSTS = st.tuples(st.integers(1, 9), st.integers(8, 24), SEED)


def draw_cost(n_layers, tokens_per_layer, seed):
    """Costs as `assignment_loss` has them: mean about 1, some blocks cheaper for every token."""
    generator = torch.Generator().manual_seed(seed)
    like = {"generator": generator, "dtype": torch.float64}
    noise = torch.rand(n_layers * tokens_per_layer, n_layers, **like)
    return 1.5 * noise + torch.rand(n_layers, **like)


def sinkhorn(cost, temperature):
    """The same problem in numpy by scaling rows and columns in turn, until nothing moves."""
    kernel = np.exp(-cost.numpy() / temperature)
    n, n_layers = kernel.shape
    v = np.ones(n_layers)
    for _ in range(100_000):
        u = 1 / (kernel @ v)
        before, v = v, n / n_layers / (kernel.T @ u)
        if np.abs(v / before - 1).max() < 1e-13:
            break
    return kernel * u[:, None] * v


@CHECKED
@given(COSTS, st.floats(0.2, 2))
def test_balanced_assignment_is_entropic_optimal_transport(sizes, temperature):
    cost = draw_cost(*sizes)
    assigned = balanced_assignment(cost, temperature, n_iterations=2000)
    expected = torch.from_numpy(sinkhorn(cost, temperature))
    torch.testing.assert_close(assigned, expected, rtol=0, atol=1e-6)


@CHECKED
@given(COSTS)
def test_loads_are_equal_after_the_default_iterations(sizes):
    """At the temperature that training uses, and there in float32: rows exactly, loads to 0.1 %."""
    cost = draw_cost(*sizes).float()
    assigned = balanced_assignment(cost, 0.3)
    assert assigned.dtype == torch.float32 and (assigned >= 0).all()
    torch.testing.assert_close(assigned.sum(1), torch.ones(len(cost)), rtol=0, atol=1e-6)
    load = assigned.mean(0) * cost.shape[1]
    torch.testing.assert_close(load, torch.ones(cost.shape[1]), rtol=0, atol=1e-3)


@CHECKED
@given(COSTS, st.floats(-5, 5), st.floats(-5, 5))
def test_a_cost_shared_by_a_block_or_by_a_token_has_no_effect(sizes, for_a_block, for_a_token):
    cost = draw_cost(*sizes)
    assigned = balanced_assignment(cost, 0.3, n_iterations=500)
    dearer = cost.clone()
    dearer[:, -1] += for_a_block
    dearer[0] += for_a_token
    again = balanced_assignment(dearer, 0.3, n_iterations=500)
    torch.testing.assert_close(again, assigned, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_a_low_temperature_approaches_the_best_balanced_assignment(seed):
    """Against the Hungarian method, every block repeated as often as it has tokens.

    Entropic optima lie at most temperature * ln L a token above it, and fall with the temperature.
    """
    cost = draw_cost(3, 5, seed)
    rows, columns = linear_sum_assignment(np.repeat(cost.numpy(), 5, axis=1))
    best = cost[rows, columns // 5].mean()
    above = []
    for temperature in (0.3, 0.1, 0.03, 0.01):
        assigned = balanced_assignment(cost, temperature, n_iterations=5000)
        above.append(float((assigned * cost).sum(1).mean() - best))
        assert -1e-6 <= above[-1] <= temperature * np.log(3)
    assert above == sorted(above, reverse=True)
    assert above[-1] < 2e-3 < above[0]
    assert cost.min(1).values.mean() < best, "balance costs something here"


def test_balanced_assignment_by_hand():
    """Block 0 is cheaper for both tokens, and the one that gains more by it gets it.

    Of a 2 x 2 assignment one number is free; cost minus temperature times entropy is least where
    its odds are exp(-(0 + 3 - 1 - 0) / (2 * temperature)).
    """
    cost = torch.tensor([[0.0, 1.0], [0.0, 3.0]], dtype=torch.float64)
    a = 1 / (1 + np.exp(1 / 0.3))
    expected = torch.tensor([[a, 1 - a], [1 - a, a]], dtype=torch.float64)
    assigned = balanced_assignment(cost, 0.3, n_iterations=1000)
    torch.testing.assert_close(assigned, expected, rtol=0, atol=1e-9)
    tied = balanced_assignment(torch.ones(4, 2), 0.3)
    torch.testing.assert_close(tied, torch.full((4, 2), 0.5))
