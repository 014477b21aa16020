"""Invariants of the router, on random shapes and values (float64, so that equality is tight)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from sae_lens_route import RouteTopKSAE, RouteTopKSAEConfig
from sae_lens_route.router import balanced_assignment, normalize, route

# at d = 2 every n(x) is +-(1, -1), so v can be 0 and all layers tie
SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 9), st.integers(3, 24))
SEED = st.integers(0, 2**31)
CHECKED = settings(max_examples=50, deadline=None)
ROUTING = st.sampled_from(["hard", "soft"])
AGGREGATION = st.sampled_from(["sum", "mean", "attention"])


def draw(shape, seed):
    tokens, n_layers, d = shape
    generator = torch.Generator().manual_seed(seed)
    like = {"generator": generator, "dtype": torch.float64}
    x = torch.randn(tokens, n_layers, d, **like) * 5 + torch.randn(n_layers, 1, **like)
    return x, torch.randn(d, n_layers, **like), torch.randn(d, **like)


def brute_force(x, W_router, routing, aggregation, q):
    """The paper's formulas, token by token and layer by layer."""
    out = []
    for token in x:
        n = [(h - h.mean()) / (h.std(unbiased=True) + 1e-6) for h in token]
        if aggregation == "attention":
            scores = torch.stack([h @ q / len(q) ** 0.5 for h in n]).softmax(0) * len(n)
        else:
            scores = torch.ones(len(n), dtype=x.dtype) / (len(n) if aggregation == "mean" else 1)
        pooled = sum(s * h for s, h in zip(scores, n, strict=True))
        p = torch.softmax(pooled @ W_router, 0)
        i = int(p.argmax())
        mixture = sum(w * h for w, h in zip(p, n, strict=True))
        out.append((p, i, p[i] * n[i] if routing == "hard" else mixture))
    return out


@CHECKED
@given(SHAPES, SEED, ROUTING, AGGREGATION)
def test_equals_the_formulas_token_by_token(shape, seed, routing, aggregation):
    x, W_router, q = draw(shape, seed)
    result = route(x, W_router, routing=routing, aggregation=aggregation, q_router=q)
    for t, (p, i, x_route) in enumerate(brute_force(x, W_router, routing, aggregation, q)):
        torch.testing.assert_close(result.probs[t], p, rtol=1e-9, atol=1e-11)
        assert result.layer[t] == i
        torch.testing.assert_close(result.x_route[t], x_route, rtol=1e-8, atol=1e-9)


@CHECKED
@given(SHAPES, SEED, ROUTING)
def test_permuting_tokens_permutes_everything(shape, seed, routing):
    x, W_router, _ = draw(shape, seed)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    permuted = route(x[order], W_router, routing=routing)
    for a, b in zip(route(x, W_router, routing=routing), permuted, strict=True):
        torch.testing.assert_close(a[order], b, rtol=1e-12, atol=1e-12)


@CHECKED
@given(SHAPES, SEED, AGGREGATION)
def test_probabilities_sum_to_one_and_hard_picks_the_largest(shape, seed, aggregation):
    x, W_router, q = draw(shape, seed)
    result = route(x, W_router, aggregation=aggregation, q_router=q)
    torch.testing.assert_close(result.probs.sum(-1), torch.ones(len(x), dtype=x.dtype))
    assert torch.equal(result.layer, result.probs.argmax(-1))
    assert torch.equal(result.weight, result.probs.max(-1).values)


@CHECKED
@given(SHAPES, SEED, ROUTING, st.floats(0.1, 100), st.floats(-10, 10))
def test_scale_and_offset_of_a_layer_change_nothing(shape, seed, routing, scale, offset):
    x, W_router, _ = draw(shape, seed)
    changed = x.clone()
    changed[:, 0] = changed[:, 0] * scale + offset
    a, b = route(x, W_router, routing=routing), route(changed, W_router, routing=routing)
    # the 1e-6 beside the standard deviation is what breaks the invariance
    torch.testing.assert_close(a.x_route, b.x_route, rtol=1e-3, atol=1e-4)


@CHECKED
@given(SHAPES, SEED)
def test_soft_with_all_probability_on_one_layer_equals_hard(shape, seed):
    x, W_router, _ = draw(shape, seed)
    sharp = W_router * 1e6
    hard, soft = route(x, sharp, routing="hard"), route(x, sharp, routing="soft")
    one_hot = hard.weight > 1 - 1e-12
    torch.testing.assert_close(soft.x_route[one_hot], hard.x_route[one_hot], rtol=1e-9, atol=1e-9)


@CHECKED
@given(SHAPES, SEED)
def test_attention_with_a_zero_query_is_the_sum(shape, seed):
    x, W_router, q = draw(shape, seed)
    attention = route(x, W_router, aggregation="attention", q_router=torch.zeros_like(q))
    torch.testing.assert_close(attention.probs, route(x, W_router).probs)


def test_gradients_against_finite_differences():
    x, W_router, q = draw((4, 3, 5), 0)

    def routed(W_router, q, x, routing):
        return route(x, W_router, routing=routing, aggregation="attention", q_router=q).x_route

    for routing in ("hard", "soft"):
        inputs = [t.clone().requires_grad_() for t in (W_router, q, x)]
        assert torch.autograd.gradcheck(lambda *a, r=routing: routed(*a, r), inputs)


def test_uniform_routing_is_uniform_unscaled_and_repeatable():
    config = {"d_in": 8, "d_sae": 16, "k": 4, "n_routed_layers": 5, "routing": "uniform"}
    x = torch.randn(5000, 5, 8)
    first = RouteTopKSAE(RouteTopKSAEConfig(**config)).route(x)
    again = RouteTopKSAE(RouteTopKSAEConfig(**config)).route(x)
    other = RouteTopKSAE(RouteTopKSAEConfig(**config, routing_seed=1)).route(x)
    assert torch.equal(first.layer, again.layer)
    assert not torch.equal(first.layer, other.layer)
    shares = torch.bincount(first.layer, minlength=5) / 5000
    # five standard errors of a share of 1/5 in 5,000 draws
    assert (shares - 0.2).abs().max() < 5 * (0.2 * 0.8 / 5000) ** 0.5
    picked = normalize(x)[torch.arange(5000), first.layer]
    torch.testing.assert_close(first.x_route, picked)


def test_wrong_shape_is_named():
    sae = RouteTopKSAE(RouteTopKSAEConfig(d_in=8, d_sae=16, k=4, n_routed_layers=5))
    with pytest.raises(
        ValueError, match=r"n_routed_layers, d_in\] = \[\.\.\., 5, 8\].*\[3, 4, 8\]"
    ):
        sae.route(torch.zeros(3, 4, 8))


# --- given shares ---------------------------------------------------------------------------------

SHARES = [0.05, 0.5, 0.0, 0.15, 0.3]


def uniform_sae(**options):
    options = {
        "d_in": 8,
        "d_sae": 16,
        "k": 4,
        "n_routed_layers": 5,
        "routing": "uniform",
        **options,
    }
    return RouteTopKSAE(RouteTopKSAEConfig(**options))


def test_given_shares_are_drawn_unscaled_and_repeatable():
    n = 20_000
    x = torch.randn(n, 5, 8, generator=torch.Generator().manual_seed(0))
    first = uniform_sae(layer_shares=SHARES).route(x)
    assert torch.equal(first.layer, uniform_sae(layer_shares=SHARES).route(x).layer)
    other = uniform_sae(layer_shares=SHARES, routing_seed=1).route(x)
    assert not torch.equal(first.layer, other.layer)

    expected = torch.tensor(SHARES)
    found = torch.bincount(first.layer, minlength=5) / n
    assert found[2] == 0
    # five standard errors of a share in 20,000 draws
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / n).sqrt()).all()
    # independent from token to token: pairs of neighbours occur as the product of their shares
    pairs = torch.bincount(first.layer[:-1] * 5 + first.layer[1:], minlength=25).view(5, 5) / n
    product = expected[:, None] * expected
    assert ((pairs - product).abs() <= 6 * (product / n).sqrt()).all()

    assert torch.equal(first.probs, expected.expand(n, 5))
    assert (first.weight == 1).all()
    torch.testing.assert_close(first.x_route, normalize(x)[torch.arange(n), first.layer])


def test_shares_of_a_batch_and_of_a_single_token():
    sae = uniform_sae(layer_shares=[0, 0, 0, 1.0, 0])
    x = torch.randn(2, 3, 5, 8)
    routing = sae.route(x)
    assert routing.layer.shape == (2, 3) and (routing.layer == 3).all()
    assert routing.probs.shape == (2, 3, 5)
    torch.testing.assert_close(routing.x_route, normalize(x[..., 3, :]))
    assert sae.route(x[0, 0]).layer == 3


def test_equal_shares_are_the_uniform_draw_in_distribution():
    n = 20_000
    x = torch.randn(n, 5, 8, generator=torch.Generator().manual_seed(0))
    equal, plain = uniform_sae(layer_shares=[0.2] * 5).route(x), uniform_sae().route(x)
    for routing in (equal, plain):
        share = torch.bincount(routing.layer, minlength=5) / n
        assert (share - 0.2).abs().max() < 5 * (0.2 * 0.8 / n) ** 0.5
    torch.testing.assert_close(equal.probs, plain.probs)


@pytest.mark.parametrize(
    "shares",
    [
        [],
        [0.5, 0.5],
        [0.2] * 6,
        [0.3] * 5,
        [0.1] * 5,
        [1.25, -0.25, 0, 0, 0],
        [float("nan")] * 5,
        [float("inf"), 0, 0, 0, 0],
    ],
)
def test_bad_shares_are_named(shares):
    with pytest.raises(ValueError, match=r"layer_shares=.*5 routed layers, adding up to 1"):
        uniform_sae(layer_shares=shares)
    for routing in ("hard", "soft"):
        with pytest.raises(ValueError, match=f"layer_shares=.*only routing='uniform'.*'{routing}'"):
            uniform_sae(layer_shares=SHARES, routing=routing)


# --- balanced assignment --------------------------------------------------------------------------

# with a token or two per layer the iteration can take thousands of rounds: 1.2 % off after 20
COSTS = st.tuples(st.integers(1, 9), st.integers(8, 24), SEED)


def draw_cost(n_layers, tokens_per_layer, seed):
    """Costs as `assignment_loss` gives them: mean about 1, some layers cheaper for every token."""
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
def test_what_a_layer_or_a_token_costs_alike_does_not_matter(sizes, for_a_layer, for_a_token):
    cost = draw_cost(*sizes)
    assigned = balanced_assignment(cost, 0.3, n_iterations=500)
    dearer = cost.clone()
    dearer[:, -1] += for_a_layer
    dearer[0] += for_a_token
    again = balanced_assignment(dearer, 0.3, n_iterations=500)
    torch.testing.assert_close(again, assigned, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_a_low_temperature_approaches_the_best_balanced_assignment(seed):
    """Against the Hungarian method, every layer standing as often as it has tokens.

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
    """Both tokens find layer 0 cheaper, and the one that gains more by it gets it.

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
