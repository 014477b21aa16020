"""Edits of features, and the hook function that applies them, against brute force."""

import math

import pytest
import torch
from support.splice import (
    KINDS,
    brute_force,
    close,
    route_sae,
    run,
    some_tokens,
)
from support.steering import (
    EDITS,
    NO_CHANGE,
    ROUTED,
    attached,
    by_hand,
    unit_of,
)

from sae_lens_route.errors import UserError
from sae_lens_route.splice import attach
from sae_lens_route.steering import (
    FeatureEdit,
    edit_features,
)

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def x():
    return torch.randn(2, 6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def p():
    """Route weights, as different as they get."""
    return torch.rand(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.05


@pytest.mark.parametrize("units", ["n(x)", "x_route"])
def test_each_mode_on_the_latents(x, p, units):
    sae = route_sae(ROUTED)
    unit = p if units == "n(x)" else torch.ones_like(p)
    z = sae.encode(x)
    feature = int((z > 0).sum((0, 1)).argmax())  # active on some tokens and not on others
    before = z[..., feature]
    assert (before > 0).any() and (before == 0).any()
    expected = {
        "set": 4 * unit,
        "add": before + 4 * unit,
        "scale": before * 4,
        "ablate": 0 * before,
    }
    for mode, after in expected.items():
        edit = FeatureEdit(feature, mode, None if mode == "ablate" else 4.0)
        moved = edit_features(attached(sae, p), edit, units=units)(x) - x
        close(moved, (after - before).unsqueeze(-1) * sae.W_dec[feature])
        assert moved.abs().max() > 0.01
        if mode in ("scale", "ablate"):  # a token without the feature is bit-identical
            assert torch.equal((x + moved)[before == 0], x[before == 0])


def test_a_value_contributes_the_same_to_every_token_of_n(x, p):
    """Whatever p is: that is what the units of n(x) mean."""
    sae = route_sae(ROUTED)
    edited = edit_features(attached(sae, p), FeatureEdit(3, "set", 4.0))(x)
    ablated = edit_features(attached(sae, p), FeatureEdit(3, "ablate"))(x)
    contribution = (edited - ablated) / p.unsqueeze(-1)
    close(contribution, (4.0 * sae.W_dec[3]).expand_as(contribution))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("units", ["n(x)", "x_route"])
@pytest.mark.parametrize("use_error_term", [True, False])
def test_logits_with_edits(small, kind, units, use_error_term):
    model, sae = small(kind)
    tokens = some_tokens(3, 11, seed=3)
    mask = torch.rand(3, 11, generator=torch.Generator().manual_seed(0)) < 0.6
    clean = run(model, tokens)
    f = by_hand(sae, mask, use_error_term, unit_of(model, sae, tokens, units))
    expected, *_ = brute_force(model, sae, ROUTED, f, lambda: run(model, tokens))
    assert (expected - clean).abs().max() > 0.1
    with attach(model, sae) as handle:
        hook = edit_features(handle, EDITS, mask, units=units, use_error_term=use_error_term)
        close(model.run_with_hooks(tokens, fwd_hooks=[(handle.name, hook)]), expected)
        nothing = edit_features(handle, NO_CHANGE, units=units)
        same = model.run_with_hooks(tokens, fwd_hooks=[(handle.name, nothing)])
    assert torch.equal(same, clean)


def test_positions(x, p):
    handle, edit = attached(route_sae(ROUTED), p), FeatureEdit(3, "set", 6.0)
    everywhere = edit_features(handle, edit)(x)
    for positions in ([1, -1], torch.tensor([False, True, False, False, False, True])):
        edited = edit_features(handle, edit, positions)(x)
        assert torch.equal(edited[:, [0, 2, 3, 4]], x[:, [0, 2, 3, 4]])
        close(edited[:, [1, 5]], everywhere[:, [1, 5]])
        assert not torch.equal(edited, x)
    for positions, message in (([2, 6], r"positions=\[6\]"), (torch.ones(4) > 0, r"\[4\].*fit")):
        with pytest.raises(ValueError, match=message):
            edit_features(handle, edit, positions)(x)


@pytest.mark.parametrize("mode", ["set", "add"])
def test_an_edit_relative_to_the_maximum(x, p, mode):
    handle = attached(route_sae(ROUTED), p)
    relative, absolute = FeatureEdit(3, mode, -1.5, relative=True), FeatureEdit(3, mode, -3.0)
    edited = edit_features(handle, relative, maxima={3: 2.0})(x)
    assert torch.equal(edited, edit_features(handle, absolute)(x))
    with pytest.raises(UserError, match=r"feature 3 .*-1.5x its maximum: the maximum is not known"):
        edit_features(handle, relative, maxima={4: 2.0})
    with pytest.raises(UserError, match="it never fired on the text"):
        edit_features(handle, relative, maxima={3: 0.0})


def test_gradients_flow_through_an_edit(small):
    """Against a finite difference along the feature's decoder direction."""
    model, sae = small()
    tokens, step = some_tokens(1, 7, seed=3), 1e-5
    direction = torch.zeros_like(sae.W_dec)
    direction[3] = torch.linspace(-1, 1, 32, dtype=torch.float64)

    def logit():
        return model.run_with_hooks(tokens, fwd_hooks=hooks)[0, -1, 5]

    with attach(model, sae) as handle:
        hooks = [(handle.name, edit_features(handle, FeatureEdit(3, "set", 6.0)))]
        with torch.enable_grad():
            sae.W_dec.requires_grad_(True)
            (gradient,) = torch.autograd.grad(logit(), sae.W_dec)
            sae.W_dec.requires_grad_(False)
        values = []
        for sign in (1, -1):
            sae.W_dec += sign * step * direction
            values.append(logit())
            sae.W_dec -= sign * step * direction
    slope = (values[0] - values[1]) / (2 * step)
    assert slope.abs() > 1e-3
    close((gradient * direction).sum(), slope, 1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FeatureEdit(-1, "set", 1.0), "feature=-1"),
        (lambda: FeatureEdit(True, "set", 1.0), "feature=True"),
        (lambda: FeatureEdit(1, "set"), "value=None: mode='set'"),
        (lambda: FeatureEdit(1, "scale", math.nan), "value=nan"),
        (lambda: FeatureEdit(1, "ablate", 2.0), "value=2.0"),
        (lambda: FeatureEdit.parse("1:clamp:2"), "edit='1:clamp:2'.*mode='clamp'"),
        (lambda: FeatureEdit.parse("x:set:2"), "edit='x:set:2'"),
        (lambda: FeatureEdit.parse("1:set:2:3"), "edit='1:set:2:3'"),
        (lambda: FeatureEdit.parse("1:scale:2x"), "edit='1:scale:2x'.*relative=True: mode='scale'"),
        (lambda: FeatureEdit.parse("1:set:x"), "edit='1:set:x'"),
        (lambda: FeatureEdit(1, "ablate", relative=True), "relative=True: mode='ablate'"),
    ],
)
def test_edits_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_edits_as_text():
    assert FeatureEdit.parse("17:set:5") == FeatureEdit(17, "set", 5.0)
    assert FeatureEdit.parse("17:scale:-1.5") == FeatureEdit(17, "scale", -1.5)
    assert FeatureEdit.parse("17:ablate") == FeatureEdit(17, "ablate")
    relative = FeatureEdit.parse("17:add:1.5x")
    assert relative == FeatureEdit(17, "add", 1.5, relative=True)
    assert str(FeatureEdit(17, "set", 5)) == "feature 17 set to 5"
    assert str(relative) == "feature 17 plus 1.5x its maximum"
