"""A RouteSAE at its hook point: spliced in by SAELens, routing modes, one block per token."""

import pytest
import torch
from sae_lens.analysis.compat import has_transformer_bridge
from support.splice import (
    KINDS,
    VOCAB,
    add_everywhere,
    brute_force,
    close,
    hook_of,
    hooked_model,
    route_sae,
    run,
    some_tokens,
)

from sae_lens_route.splice import RouteSAETransformer, attach

pytestmark = pytest.mark.usefixtures("no_gradients")

ROUTED = [2, 3, 5]
NAME = "blocks.5.route.hook_resid_post"


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("unscaled", [False, True])
def test_sixteen_blocks_with_an_sae(seed, unscaled):
    model = hooked_model("llama", RouteSAETransformer, n_layers=16, seed=seed, d=16)
    routed = list(range(3, 12))
    sae = route_sae(routed, seed, d=16)
    tokens = torch.randint(2, VOCAB, (2, 13), generator=torch.Generator().manual_seed(seed))
    clean = model(tokens)

    def reconstruct(value):
        return sae.decode(sae.encode(value))

    expected, _, used = brute_force(
        model, sae, routed, reconstruct, lambda: model(tokens), unscaled
    )
    assert (expected - clean).abs().max() > 0.1
    handle = attach(model, sae, unscaled=True) if unscaled else None

    close(model.run_with_saes(tokens, saes=[sae]), expected)
    close(model.run_with_saes(tokens, saes=[sae], use_error_term=True), clean)
    logits, cache = model.run_with_cache_with_saes(tokens, saes=[sae])
    close(logits, expected)
    name = "blocks.11.route.hook_resid_post"
    close(cache[f"{name}.hook_sae_input"], used)
    close(cache[f"{name}.hook_sae_acts_post"], sae.encode(used))

    if handle is not None:
        handle.remove()
    assert torch.equal(model(tokens), clean)
    assert name not in model.hook_dict


if has_transformer_bridge():

    def test_sae_on_a_bridge(make_model):
        model, routed = make_model("bridge-llama"), [1, 2, 4, 5]
        sae = route_sae(routed)
        tokens = torch.randint(2, VOCAB, (2, 7), generator=torch.Generator().manual_seed(3))
        clean = model(tokens)
        expected, _, used = brute_force(
            model, sae, routed, lambda x: sae.decode(sae.encode(x)), lambda: model(tokens)
        )
        with attach(model, sae) as handle:
            close(model.run_with_saes(tokens, saes=[sae]), expected)
            close(model.run_with_saes(tokens, saes=[sae], use_error_term=True), clean)
            logits, cache = model.run_with_cache_with_saes(tokens, saes=[sae])
            close(logits, expected)
            close(cache[f"{handle.name}.hook_sae_acts_post"], sae.encode(used))


def test_the_hook_fires_once_per_routed_block_with_tokens(make_model):
    model, sae, tokens = make_model("hooked-llama"), route_sae(ROUTED), some_tokens(1, 2)
    values = []

    def edit(value, hook):
        values.append(value.clone())
        return value + 1

    with attach(model, sae) as handle:
        model.run_with_hooks(tokens, fwd_hooks=[(NAME, edit)])
        layers = handle.routing.route.unique().tolist()
        assert len(values) == 1 + len([layer for layer in layers if layer > 0])
        assert torch.equal(values[0], handle.routing.x_route)


def test_an_edit_of_one_feature_with_the_error_term():
    """Steering as SAELens does it: the error term is of the unedited features."""
    model, sae = hooked_model("llama", RouteSAETransformer), route_sae(ROUTED)
    tokens, feature = some_tokens(), 3

    def clamp(acts, hook):
        acts[..., feature] = 4.0
        return acts

    def edit(value):
        clean = sae.encode(value)
        acts = clean.clone()
        acts[..., feature] = 4.0
        return value + sae.decode(acts) - sae.decode(clean)

    with model.saes([sae], use_error_term=True):
        steered = model.run_with_hooks(tokens, fwd_hooks=[(f"{NAME}.hook_sae_acts_post", clamp)])
    with attach(model, sae):
        expected = model.run_with_hooks(tokens, fwd_hooks=[(NAME, hook_of(edit))])
    close(steered, expected)


def test_special_tokens_are_left_alone():
    model, sae = hooked_model("llama", RouteSAETransformer), route_sae(ROUTED)
    tokens = some_tokens()
    special = [int(tokens[0, 0]), int(tokens[1, 3])]
    is_special = torch.isin(tokens, torch.tensor(special)).unsqueeze(-1)

    def edit(value):
        return torch.where(is_special, value, sae.decode(sae.encode(value)))

    logits = model.run_with_saes(tokens, saes=[sae], exclude_special_tokens=special)
    with attach(model, sae):
        close(logits, model.run_with_hooks(tokens, fwd_hooks=[(NAME, hook_of(edit))]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_kl_of_an_untrained_sae_is_not_zero(make_model, kind):
    """Item 20 of the reference's list: there it is, with some versions, as nothing gets edited."""
    model, sae, tokens = make_model(kind), route_sae(ROUTED), some_tokens()
    clean = run(model, tokens).log_softmax(-1)
    with attach(model, sae) as handle:
        model.hook_dict[handle.name].add_hook(hook_of(lambda x: sae.decode(sae.encode(x))))
        spliced = run(model, tokens).log_softmax(-1)
    assert (clean.exp() * (clean - spliced)).sum(-1).mean() > 0.01


def test_soft_routing_can_be_read_and_not_edited(make_model):
    model, tokens = make_model("hooked-llama"), some_tokens()
    sae, clean = route_sae(ROUTED, routing="soft"), model(tokens)
    with attach(model, sae):
        logits, cache = model.run_with_cache(tokens)
        assert torch.equal(logits, clean)
        streams = torch.stack([cache[f"blocks.{b}.hook_resid_post"] for b in ROUTED], -2)
        close(cache[NAME], sae.route(streams).x_route)
        with pytest.raises(ValueError, match="soft routing"):
            model.run_with_hooks(tokens, fwd_hooks=[(NAME, hook_of(add_everywhere))])
        assert torch.equal(model(tokens), clean)


def test_uniform_routing_draws_once_per_pass(make_model):
    model, tokens = make_model("hooked-llama"), some_tokens(4, 9)
    sae = route_sae(ROUTED, routing="uniform")
    with attach(model, sae) as handle:
        model.run_with_hooks(tokens, fwd_hooks=[(NAME, hook_of(lambda x: 2 * x))])
        layer = handle.routing.route
    again = torch.randint(3, layer.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer, again)


@torch.enable_grad()
def test_gradients_of_an_sae_that_was_added():
    model = hooked_model("llama", RouteSAETransformer, n_layers=5, d=16).requires_grad_(False)
    sae, tokens = route_sae([1, 2, 3], d=16).requires_grad_(), some_tokens(2, 5)
    generator = torch.Generator().manual_seed(0)
    readout = torch.randn(2, 5, VOCAB, generator=generator, dtype=torch.float64)

    def loss():
        return (model.run_with_saes(tokens, saes=[sae]) * readout).sum()

    names, parameters = zip(*sae.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss(), parameters)
    assert "W_router" in names
    for parameter, gradient in zip(parameters, gradients, strict=True):
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = []
        with torch.no_grad():
            for step in (1e-6, -2e-6, 1e-6):
                parameter += step * direction
                values.append(loss())
        close((gradient * direction).sum(), (values[0] - values[1]) / 2e-6, 1e-5)
