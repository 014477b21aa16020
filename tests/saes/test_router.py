"""Invariants of the router, on random shapes and values (float64, so that equality is tight)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lens_route.saes import RouteTopKSAE, RouteTopKSAEConfig
from sae_lens_route.saes.router import normalize, route, streams_at

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
        assert result.route[t] == i
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
    assert torch.equal(result.route, result.probs.argmax(-1))
    assert torch.equal(result.weight, result.probs.max(-1).values)


@CHECKED
@given(SHAPES, SEED, ROUTING, st.floats(0.1, 100), st.floats(-10, 10))
def test_scale_and_offset_of_a_layer_change_nothing(shape, seed, routing, scale, offset):
    x, W_router, _ = draw(shape, seed)
    changed = x.clone()
    changed[:, 0] = changed[:, 0] * scale + offset
    a, b = route(x, W_router, routing=routing), route(changed, W_router, routing=routing)
    # the 1e-6 added to the standard deviation breaks the invariance
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
    assert torch.equal(first.route, again.route)
    assert not torch.equal(first.route, other.route)
    shares = torch.bincount(first.route, minlength=5) / 5000
    # five standard errors of a share of 1/5 in 5,000 draws
    assert (shares - 0.2).abs().max() < 5 * (0.2 * 0.8 / 5000) ** 0.5
    picked = normalize(x)[torch.arange(5000), first.route]
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
    first = uniform_sae(route_shares=SHARES).route(x)
    assert torch.equal(first.route, uniform_sae(route_shares=SHARES).route(x).route)
    other = uniform_sae(route_shares=SHARES, routing_seed=1).route(x)
    assert not torch.equal(first.route, other.route)

    expected = torch.tensor(SHARES)
    found = torch.bincount(first.route, minlength=5) / n
    assert found[2] == 0
    # five standard errors of a share in 20,000 draws
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / n).sqrt()).all()
    # independent from token to token: pairs of neighbours occur as the product of their shares
    pairs = torch.bincount(first.route[:-1] * 5 + first.route[1:], minlength=25).view(5, 5) / n
    product = expected[:, None] * expected
    assert ((pairs - product).abs() <= 6 * (product / n).sqrt()).all()

    assert torch.equal(first.probs, expected.expand(n, 5))
    assert (first.weight == 1).all()
    torch.testing.assert_close(first.x_route, normalize(x)[torch.arange(n), first.route])


def test_shares_of_a_batch_and_of_a_single_token():
    sae = uniform_sae(route_shares=[0, 0, 0, 1.0, 0])
    x = torch.randn(2, 3, 5, 8)
    routing = sae.route(x)
    assert routing.route.shape == (2, 3) and (routing.route == 3).all()
    assert routing.probs.shape == (2, 3, 5)
    torch.testing.assert_close(routing.x_route, normalize(x[..., 3, :]))
    assert sae.route(x[0, 0]).route == 3


def test_equal_shares_are_the_uniform_draw_in_distribution():
    n = 20_000
    x = torch.randn(n, 5, 8, generator=torch.Generator().manual_seed(0))
    equal, plain = uniform_sae(route_shares=[0.2] * 5).route(x), uniform_sae().route(x)
    for routing in (equal, plain):
        share = torch.bincount(routing.route, minlength=5) / n
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
    with pytest.raises(ValueError, match=r"route_shares=.*5 routed blocks, summing to 1"):
        uniform_sae(route_shares=shares)
    for routing in ("hard", "soft"):
        with pytest.raises(ValueError, match=f"route_shares=.*only routing='uniform'.*'{routing}'"):
            uniform_sae(route_shares=SHARES, routing=routing)


def test_streams_of_neighboring_routes_are_a_view():
    x = torch.arange(2 * 3 * 5 * 4.0).view(2, 3, 5, 4)
    for routes in ([1, 2, 3], [0], [0, 2, 4], [0, 1, 2, 3, 4]):
        found = streams_at(x, routes)
        assert torch.equal(found, torch.stack([x[..., i, :] for i in routes], dim=-2))
        is_view = found.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        assert is_view == (routes != [0, 2, 4])


def test_the_decision_for_some_tokens():
    x = torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(0))
    routing = route(x, torch.randn(8, 3, generator=torch.Generator().manual_seed(1)))
    some = routing.of(slice(1, None, 2))
    assert all(torch.equal(a, b[1::2]) for a, b in zip(some, routing, strict=True))
