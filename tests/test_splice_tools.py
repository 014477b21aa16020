"""What is around a splice: cost in block calls, attaching and detaching, the tools of SAELens and
TransformerLens at the routed hook, gradients, and the reference implementation's numbers."""

import gc
import json
import math
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from golden_numbers import FOLDER, golden_sae, load
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.load_model import HookedProxyLM
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from test_splice import (
    KINDS,
    VOCAB,
    D,
    add_everywhere,
    block_calls,
    close,
    hook_of,
    hooked_model,
    make_model,  # noqa: F401
    no_gradients_and_one_thread,  # noqa: F401
    route_sae,
    run,
    tensor,
    with_hooks,
)
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint

from sae_lens_route.models import decoder_blocks, load_model
from sae_lens_route.splice import RouteSAETransformer, attach

ROUTED = [2, 3, 5]
NAME = "blocks.5.hook_resid_route"


def some_tokens(batch=2, length=7, seed=0):
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def hooks_on(model):
    """Every hook on every module, to see that none is left behind."""
    root = model.model if isinstance(model, HookedProxyLM) else model
    return {
        name: (len(module._forward_hooks), len(module._forward_pre_hooks), set(vars(module)))
        for name, module in root.named_modules()
    }


# --- cost ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_no_block_runs_twice_unless_something_was_edited(make_model, kind):  # noqa: F811
    model, sae, tokens = make_model(kind), route_sae(ROUTED), some_tokens()
    clean, seen = run(model, tokens), []

    def read(value, hook):
        seen.append(value)
        return value

    def copy(value, hook):
        return value.clone()

    def calls_with(hook):
        return block_calls(model, lambda: model.run_with_hooks(tokens, fwd_hooks=[(NAME, hook)]))

    with attach(model, sae):
        assert block_calls(model, lambda: model.run_with_cache(tokens)) == [1] * 8
        logits, cache = model.run_with_cache(tokens, names_filter=[NAME])
        assert torch.equal(logits, clean)
        assert calls_with(read) == [1] * 8
        assert calls_with(copy) == [1] * 8
        assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=[(NAME, copy)]), clean)
        assert torch.equal(seen[-1], cache[NAME])
        assert calls_with(hook_of(add_everywhere)) == [1, 1, 1, 2, 2, 2, 1, 1]


def test_the_hook_fires_once_per_routed_block_with_tokens(make_model):  # noqa: F811
    model, sae, tokens = make_model("hooked-llama"), route_sae(ROUTED), some_tokens(1, 2)
    values = []

    def edit(value, hook):
        values.append(value.clone())
        return value + 1

    with attach(model, sae) as handle:
        model.run_with_hooks(tokens, fwd_hooks=[(NAME, edit)])
        layers = handle.routing.layer.unique().tolist()
        assert len(values) == 1 + len([layer for layer in layers if layer > 0])
        assert torch.equal(values[0], handle.routing.x_route)


def test_other_tokens_keep_their_bits(make_model):  # noqa: F811
    model, sae, tokens = make_model("hooked-gpt2"), route_sae(ROUTED), some_tokens(2, 9)
    clean = model(tokens)

    def edit(value, hook):
        return torch.cat([value[:, :6], value[:, 6:] + 1], 1)

    with attach(model, sae):
        edited = model.run_with_hooks(tokens, fwd_hooks=[(NAME, edit)])
    assert torch.equal(edited[:, :6], clean[:, :6])
    assert not torch.equal(edited[:, 6:], clean[:, 6:])


# --- attaching and detaching ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_removing_restores_the_model(make_model, kind):  # noqa: F811
    model, sae, tokens = make_model(kind), route_sae(ROUTED), some_tokens()
    clean, hook_dict, hooks = run(model, tokens), list(model.hook_dict), hooks_on(model)
    mod_dict = list(getattr(model, "mod_dict", ()))
    with attach(model, sae) as handle:
        assert isinstance(model.hook_dict[NAME], HookPoint)
        assert model.hook_dict[NAME] is handle.hook_point
        with pytest.raises(ValueError, match="attached already"):
            attach(model, sae)
        model.run_with_hooks(tokens, fwd_hooks=[(NAME, hook_of(add_everywhere))])
        if not isinstance(model, HookedProxyLM):
            model.run_with_saes(tokens, saes=[sae])
            model.add_sae(sae)
        if isinstance(model, HookedTransformer):
            model(tokens, stop_at_layer=4)  # a pass that never gets to the hook
    assert list(model.hook_dict) == hook_dict
    assert list(getattr(model, "mod_dict", ())) == mod_dict
    assert hooks_on(model) == hooks
    assert torch.equal(run(model, tokens), clean)
    handle.remove()  # again: nothing happens
    assert model.hook_dict.get(NAME) is None


def test_removing_frees_memory(make_model):  # noqa: F811
    model, tokens = make_model("hooked-llama"), some_tokens()

    def use():
        handle = attach(model, route_sae(ROUTED))
        model.run_with_hooks(tokens, fwd_hooks=[(NAME, hook_of(add_everywhere))])
        handle.remove()
        return weakref.ref(handle), weakref.ref(handle.sae)

    def live_tensors():
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    use()
    before = live_tensors()
    references = [reference for _ in range(3) for reference in use()]
    assert live_tensors() <= before
    assert all(reference() is None for reference in references)


def test_metadata_that_does_not_fit(make_model):  # noqa: F811
    model = make_model("hooked-llama")
    for changes, message in [
        ({"hook_names": None}, "hook_names"),
        ({"hook_name": "blocks.3.hook_resid_route"}, "blocks.5."),
        ({"hook_names": ["blocks.2.hook_resid_pre"] * 3}, "after blocks"),
        ({"hook_names": ["blocks.2.hook_resid_post", "blocks.5.hook_resid_post"]}, "do not fit"),
        ({"hook_names": [f"blocks.{b}.hook_resid_post" for b in (5, 3, 2)]}, "in order"),
        ({"hook_names": [f"blocks.{b}.hook_resid_post" for b in (2, 3, 8)]}, "0 to 7"),
        ({"hook_name": "blocks.5.hook_resid_post"}, "another hook point"),
    ]:
        sae = route_sae(ROUTED)
        for field, value in changes.items():
            sae.cfg.metadata[field] = value
        with pytest.raises(ValueError, match=message):
            attach(model, sae)
    with pytest.raises(ValueError, match="width 32"):
        attach(model, route_sae(ROUTED, d=16))
    with pytest.raises(TypeError, match="HookedProxyLM"):
        attach(make_model("proxy-llama").model, route_sae(ROUTED))
    assert NAME not in model.hook_dict


def test_names_of_another_kind_of_model(make_model):  # noqa: F811
    """An SAE trained on one kind runs on the others: names say which blocks, not which library."""
    tokens, results = some_tokens(), []
    for names in ("blocks.{}.hook_resid_post", "blocks.{}.hook_out", "model.layers.{}"):
        sae = route_sae(ROUTED)
        sae.cfg.metadata.hook_names = [names.format(b) for b in ROUTED]
        with attach(make_model("proxy-llama"), sae):
            results.append(make_model("proxy-llama").run_with_cache(tokens)[1][NAME])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_pass_that_skips_routed_blocks_is_refused(make_model):  # noqa: F811
    model, sae, tokens = make_model("hooked-llama"), route_sae(ROUTED), some_tokens()
    with attach(model, sae):
        residual = model(tokens, stop_at_layer=3)
    with attach(model, sae), pytest.raises(RuntimeError, match="start before block 2"):
        model(residual, start_at_layer=3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_hook_fires_when_the_pass_stops_after_it(make_model, kind):  # noqa: F811
    model, sae, tokens = make_model(kind), route_sae(ROUTED), some_tokens()
    with attach(model, sae):
        _, whole = model.run_with_cache(tokens, names_filter=[NAME])
        _, cache = model.run_with_cache(tokens, names_filter=[NAME], stop_at_layer=6)
        assert torch.equal(cache[NAME], whole[NAME])
        calls = block_calls(
            model,
            lambda: model.run_with_cache(tokens, names_filter=[NAME], stop_at_layer=6),
        )
    assert calls[:5] == [1] * 5 and calls[6:] == [0, 0]


# --- RouteSAETransformer -------------------------------------------------------------------------


def test_route_sae_transformer_attaches_by_itself():
    model = hooked_model("llama", RouteSAETransformer)
    sae, other, tokens = route_sae(ROUTED), route_sae(ROUTED, seed=1), some_tokens()
    clean, hook_dict = model(tokens), list(model.hook_dict)

    def logits_with(sae):
        with attach(plain, sae):
            return plain.run_with_saes(tokens, saes=[sae])

    plain = hooked_model("llama")
    expected, expected_other = logits_with(sae), logits_with(other)

    assert torch.equal(model.run_with_saes(tokens, saes=[sae]), expected)
    assert list(model.hook_dict) == hook_dict
    _, cache = model.run_with_cache_with_saes(tokens, saes=[sae])
    assert f"{NAME}.hook_sae_acts_post" in cache
    with model.saes([sae]):
        assert torch.equal(model(tokens), expected)
        assert torch.equal(model.run_with_saes(tokens, saes=[other]), expected_other)
        assert torch.equal(model(tokens), expected)  # the first one is back, with its router
    assert torch.equal(model(tokens), clean)
    assert list(model.hook_dict) == hook_dict

    model.add_sae(sae)
    model.add_sae(other)
    assert torch.equal(model(tokens), expected_other)
    model.reset_saes()
    assert torch.equal(model(tokens), clean)
    assert list(model.hook_dict) == hook_dict

    with attach(model, sae, unscaled=True) as handle:  # by hand: stays, with its option
        unscaled = model.run_with_saes(tokens, saes=[sae])
        assert model.hook_dict[NAME] is handle.hook_point
        assert not torch.equal(unscaled, expected)
        with pytest.raises(ValueError, match="attached already"):
            model.add_sae(other)
    assert list(model.hook_dict) == hook_dict


def test_an_edit_of_one_feature_beside_the_error_term():
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


# --- routing modes -------------------------------------------------------------------------------


def test_soft_routing_can_be_read_and_not_edited(make_model):  # noqa: F811
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


def test_uniform_routing_draws_once_per_pass(make_model):  # noqa: F811
    model, tokens = make_model("hooked-llama"), some_tokens(4, 9)
    sae = route_sae(ROUTED, routing="uniform")
    with attach(model, sae) as handle:
        model.run_with_hooks(tokens, fwd_hooks=[(NAME, hook_of(lambda x: 2 * x))])
        layer = handle.routing.layer
    again = torch.randint(3, layer.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer, again)


# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["llama", "gpt2"])
@torch.enable_grad()
def test_gradients_against_finite_differences(style):
    """Through the edit, the activation, p of the clean half, and the blocks of both halves."""
    model = hooked_model(style, n_layers=5, d=16).requires_grad_(False)
    routed = [1, 2, 3]
    sae, tokens = route_sae(routed, d=16), some_tokens(2, 5)
    generator = torch.Generator().manual_seed(0)
    readout = torch.randn(2, 5, VOCAB, generator=generator, dtype=torch.float64)
    residual = model(tokens, stop_at_layer=0)
    shift = torch.zeros_like(residual)
    directions = torch.randn(2, *residual.shape, generator=generator, dtype=torch.float64)

    with attach(model, sae) as handle:

        def loss(residual, shift):
            hooks = [(handle.name, hook_of(lambda value: value.tanh() + shift))]
            logits = model.run_with_hooks(residual, start_at_layer=0, fwd_hooks=hooks)
            return (logits * readout).sum()

        inputs = [residual.requires_grad_(), shift.requires_grad_()]
        gradients = torch.autograd.grad(loss(*inputs), inputs)
        for i, (gradient, direction) in enumerate(zip(gradients, directions, strict=True)):
            step = [torch.zeros_like(residual), torch.zeros_like(residual)]
            step[i] = 1e-6 * direction
            with torch.no_grad():
                up = loss(residual + step[0], shift + step[1])
                down = loss(residual - step[0], shift - step[1])
            close((gradient * direction).sum(), (up - down) / 2e-6, 1e-5)


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


@torch.enable_grad()
def test_attribution_at_an_unchanged_hook():
    """Backward hooks and an exact error term leave the value alone; gradients flow nevertheless."""
    model = hooked_model("llama").requires_grad_(False)
    sae, tokens = route_sae(ROUTED), some_tokens()
    clean = model(tokens)
    shift = torch.zeros(*tokens.shape, D, dtype=torch.float64, requires_grad=True)
    gradients = []

    def watch(gradient, hook):
        gradients.append(gradient.clone())

    with attach(model, sae):
        hooks = [(NAME, hook_of(lambda value: value + shift))]
        logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
        assert torch.equal(logits, clean)
        (expected,) = torch.autograd.grad(logits[..., :5].sum(), shift)
        assert expected.abs().sum(-1).min() > 0

        residual = model(tokens, stop_at_layer=0).requires_grad_()
        model.add_hook(NAME, watch, dir="bwd")
        logits = model(residual, start_at_layer=0)
        assert torch.equal(logits, clean)
        logits[..., :5].sum().backward()
        model.reset_hooks()
    close(torch.stack(gradients).sum(0), expected)


# --- the reference implementation ----------------------------------------------------------------


def reference_codec(sae, edit=lambda latents: latents):
    """The reference's encode and decode: its top-k keeps negative values (no ReLU)."""

    def f(value):
        top = ((value - sae.b_dec) @ sae.W_enc + sae.b_enc).topk(sae.cfg.k)
        latents = torch.zeros(*value.shape[:-1], sae.cfg.d_sae).scatter(-1, *top[::-1])
        return sae.decode(edit(latents))

    return f


class Recited(torch.nn.Module):
    """A 'model' whose blocks put out given streams, whatever comes in."""

    class Block(torch.nn.Module):
        def __init__(self, output):
            super().__init__()
            self.output = output

        def forward(self, hidden_states):
            return self.output

    def __init__(self, streams):
        super().__init__()
        config = SimpleNamespace(num_hidden_layers=len(streams), hidden_size=streams.shape[-1])
        self.config = SimpleNamespace(get_text_config=lambda: config)
        self.layers = torch.nn.ModuleList([self.Block(stream) for stream in streams])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("golden", ["splice", "splice_steer"])
def test_reference_splice_of_given_streams(seed, golden):
    tensors, info = load(f"seed{seed}_route")
    streams = tensors["x_raw"][0].movedim(-2, 0)
    model = HookedProxyLM(Recited(streams), None)
    sae = golden_sae(tensors, info)
    sae.cfg.metadata = SAEMetadata(
        hook_name="blocks.8.hook_resid_route", hook_names=[f"layers.{i}" for i in range(9)]
    )

    def steer(latents):
        for name, sign in (("set_high", 1), ("set_low", -1)):
            for latent, value, mode in info["steer"][name]:
                if mode == 0:
                    latents[..., latent] += sign * value
                else:
                    latents[..., latent] *= value**sign
        return latents

    codec = reference_codec(sae, steer) if golden == "splice_steer" else reference_codec(sae)
    outputs = {}

    def make_hook(i):
        def hook(module, args, output):
            outputs[i] = output
            if i == 1:  # the first routed block is not replayed, its edited output comes in here
                outputs[0] = args[0]

        return hook

    with attach(model, sae, unscaled=True) as handle:
        model.hook_dict[handle.name].add_hook(hook_of(codec))
        with_hooks(model.model.layers, make_hook, lambda: model.model(streams[0]))
    spliced = torch.stack([outputs[i] for i in range(9)], -2)
    close(spliced, tensors[f"hard_sum.{golden}"], 1e-5)


LM_KINDS = ["AutoModelForCausalLM", "HookedTransformer"]
if any(kind.startswith("bridge") for kind in KINDS):
    LM_KINDS.append("TransformerBridge")


@pytest.fixture(scope="module")
def tinyllama():
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = load_model(str(FOLDER / "tinyllama"), kind)
        return made[kind]

    return make


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", LM_KINDS)
def test_reference_metrics_of_a_language_model(tinyllama, kind, seed):
    """KL, delta CE and the parts of the recovered loss, all to 5e-4.

    Padding is compared where all kinds treat it alike: the reference counts it, and only the
    Hugging Face model does with it what the reference's did.
    """
    tensors, info = load(f"seed{seed}_lm")
    model, sae = tinyllama(kind), golden_sae(tensors, info)
    routed = list(range(3, 12))
    sae.cfg.metadata = SAEMetadata(
        hook_name="blocks.11.hook_resid_route",
        hook_names=[f"blocks.{b}.hook_resid_post" for b in routed],
    )
    tokens, mask = tensors["input_ids"], tensors["attention_mask"]
    proxy = kind == "AutoModelForCausalLM"
    counted = torch.ones_like(mask) if proxy else mask
    counted = counted.bool()

    def logits():
        return run(model, tokens, mask if proxy else None)

    original = logits()
    with attach(model, sae, unscaled=True) as handle:
        model.hook_dict[handle.name].add_hook(hook_of(reference_codec(sae)))
        reconstructed = logits()
        layer = handle.routing.layer
        assert torch.equal(layer[counted], tensors["argmax_layer"][counted])
        close(handle.routing.probs[counted], tensors["router_weights"][counted], 1e-4)

    def ablate(i):
        def hook(module, args, output):
            here = (layer == i - 3).unsqueeze(-1)
            x = tensor(output).masked_fill(here, 0.0)
            return (x, *output[1:]) if isinstance(output, tuple) else x

        return hook

    zeroed = with_hooks(decoder_blocks(model), ablate, logits)

    for ours, theirs in ((original, "original"), (reconstructed, "reconstruct"), (zeroed, "zero")):
        for i, position in enumerate(info["logit_positions"]):
            rows = counted[:, position]
            close(ours[rows, position], tensors[f"logits_{theirs}.slice"][rows, i], 5e-4)

    p, q = original.log_softmax(-1), reconstructed.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    expected_kl = tensors["derived.kl_per_token"]
    assert (kl - expected_kl)[counted].abs().max() < 5e-4 * expected_kl.max()

    def cross_entropy(logits):
        targets, use = tokens[:, 1:], counted[:, 1:]
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].movedim(-1, 1), targets, reduction="none"
        )
        return float(loss[use].double().mean())

    delta = cross_entropy(reconstructed) - cross_entropy(original)
    if proxy:
        metrics, parts = info["reference_metrics"], info["components_float64_from_reference_logits"]
        assert float(kl.sum()) / len(tokens) == pytest.approx(metrics["KLDiv"], rel=5e-4)
        assert delta == pytest.approx(metrics["DeltaCE"], rel=5e-4)
        assert cross_entropy(original) == pytest.approx(parts["ce_original"], rel=5e-4)
        assert cross_entropy(reconstructed) == pytest.approx(parts["ce_reconstruct"], rel=5e-4)
        assert cross_entropy(zeroed) == pytest.approx(parts["ce_zero"], rel=5e-4)
    else:
        masked = info["derived_masked_not_in_reference"]
        real = float(kl[mask.bool()].mean())
        assert real == pytest.approx(masked["kl_mean_per_real_token"], rel=5e-4)
        assert delta == pytest.approx(masked["delta_ce_masked"], rel=5e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_kl_of_an_untrained_sae_is_not_zero(make_model, kind):  # noqa: F811
    """Item 20 of the reference's list: there it is, with some versions, as nothing gets edited."""
    model, sae, tokens = make_model(kind), route_sae(ROUTED), some_tokens()
    clean = run(model, tokens).log_softmax(-1)
    with attach(model, sae) as handle:
        model.hook_dict[handle.name].add_hook(hook_of(lambda x: sae.decode(sae.encode(x))))
        spliced = run(model, tokens).log_softmax(-1)
    assert (clean.exp() * (clean - spliced)).sum(-1).mean() > 0.01


def test_blocks_that_return_tuples():
    """What decoder layers of transformers up to 4.53 return."""
    streams = torch.randn(
        3, 2, 4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )

    class InTuples(Recited):
        def forward(self, x):
            for layer in self.layers:
                x = layer(x)[0]
            return x

    class Block(torch.nn.Module):
        def __init__(self, output):
            super().__init__()
            self.output = output

        def forward(self, hidden_states):
            return (hidden_states + self.output, "attention weights")

    class Plain(Block):
        def forward(self, hidden_states):
            return hidden_states + self.output

    results = []
    for model_class, block_class in ((InTuples, Block), (Recited, Plain)):
        inner = model_class(streams)
        inner.layers = torch.nn.ModuleList([block_class(stream) for stream in streams])
        model, sae = HookedProxyLM(inner, None), route_sae([0, 1, 2], d=16)
        with attach(model, sae) as handle:
            model.hook_dict[handle.name].add_hook(hook_of(add_everywhere))
            results.append(inner(streams[0]))
    assert torch.equal(*results)
    assert not torch.equal(results[0], streams[0] + streams.sum(0))


# --- SAELens's evaluation ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.endswith("llama")])
def test_run_evals_with_everything_on(make_model, kind):  # noqa: F811
    model, sae = make_model(kind), route_sae(ROUTED)
    metadata = {"context_size": 12, "prepend_bos": True, "dataset_path": "none"}
    for field, value in metadata.items():
        sae.cfg.metadata[field] = value
    tokens = some_tokens(40, 12)
    tokens[:, 0] = 0
    store = {
        "dataset": Dataset.from_dict({"tokens": tokens.tolist()}),
        "streaming": False,
        "store_batch_size_prompts": 4,
        "n_batches_in_buffer": 2,
        "train_batch_size_tokens": 12,
    }
    with attach(model, sae) as handle:
        metrics, features = run_evals(
            sae,
            ActivationsStore.from_sae(model, sae, **store),
            model,
            ActivationScaler(),
            get_eval_everything_config(
                batch_size_prompts=4,
                n_eval_reconstruction_batches=2,
                n_eval_sparsity_variance_batches=2,
            ),
            exclude_special_tokens=[0, 1],
        )
        assert handle.routing is not None
    numbers = {name: value for group in metrics.values() for name, value in group.items()}
    assert all(math.isfinite(value) for value in numbers.values())
    assert numbers["kl_div_with_sae"] > 0.01
    assert numbers["kl_div_with_ablation"] > 0.01
    assert numbers["l0"] <= sae.cfg.k
    assert len(features["feature_density"]) == sae.cfg.d_sae


def test_the_benchmark_runs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    sys.modules.pop("splice", None)
    import splice  # type: ignore[import-not-found]

    splice.main(["--tiny", "--output", str(tmp_path / "splice.json")])
    result = json.loads((tmp_path / "splice.json").read_text())
    for table in result["models"].values():
        assert {"clean", "read", "two passes"} <= set(table)
        assert all(row["ratio"] > 0 for row in table.values())
