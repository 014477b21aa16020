"""A model whose blocks are spread over two GPUs, with the SAE on either: values as on the CPU.

The devices are not there (`support/devices.py`): values are real, and mixing devices raises. One
GPU's formula of the moments differs from the CPU's, hence a tolerance: 1e-9 in float64.
"""

import pytest
import torch
from sae_lens.saes.sae import SAEMetadata
from support.crosscoders import crosscoder
from support.devices import PlacedTensor, place_module, placed, pretend_gpus
from support.splice import D, close, hook_of, hooked_model, route_sae, some_tokens

from sae_lens_route.config import crosscoder_hook_name
from sae_lens_route.data.reading import activation_batches
from sae_lens_route.evals.evaluate import evaluate_all
from sae_lens_route.splice import attach

pytestmark = pytest.mark.usefixtures("no_gradients")
ROUTED, N_LAYERS = [1, 3, 4, 6], 8
SAE_DEVICES = ["meta:0", "meta:1"]


def spread_model():
    """TransformerLens's own placement over two devices: it moves the stream between blocks."""
    model = hooked_model("llama", n_layers=N_LAYERS)
    model.cfg.device, model.cfg.n_devices = "meta:0", 2
    place_module(model.embed, "meta:0")
    for i, block in enumerate(model.blocks):
        place_module(block, f"meta:{i * 2 // N_LAYERS}")
    for module in (model.ln_final, model.unembed):
        place_module(module, "meta:1")
    return model


def new_sae(kind):
    metadata = {"context_size": 7, "exclude_special_tokens": [5], "seqpos_slice": (None,)}
    if kind == "crosscoder":
        names = [f"blocks.{block}.hook_resid_post" for block in ROUTED]
        hook_name = crosscoder_hook_name(ROUTED[-1])
        sae = crosscoder(
            "topk", len(ROUTED), D, metadata=SAEMetadata(hook_name=hook_name, hook_names=names)
        ).requires_grad_(False)
    else:
        sae = route_sae(ROUTED, routing=kind)
    for name, value in metadata.items():
        setattr(sae.cfg.metadata, name, value)
    return sae


def on(sae, device):
    place_module(sae, device)
    return sae


def values(x):
    return x.values if isinstance(x, PlacedTensor) else x


def run_edited(model, sae, tokens, edit, **options):
    with attach(model, sae, **options) as hook:
        logits = model.run_with_hooks(tokens, fwd_hooks=[(hook.name, hook_of(edit))])
    return values(logits)


def reconstruct(sae):
    return lambda value: sae.decode(sae.encode(value))


every_sae_device = pytest.mark.parametrize("device", SAE_DEVICES)


@every_sae_device
@pytest.mark.parametrize("unscaled", [False, True])
def test_a_splice(device, unscaled):
    tokens, model = some_tokens(), hooked_model("llama", n_layers=N_LAYERS)
    sae = new_sae("hard")
    expected = run_edited(model, sae, tokens, reconstruct(sae), unscaled=unscaled)
    with pretend_gpus():
        there = on(new_sae("hard"), device)
        found = run_edited(
            spread_model(), there, placed(tokens, "meta:0"), reconstruct(there), unscaled=unscaled
        )
    assert not torch.equal(expected, model(tokens))
    close(found, expected)


@every_sae_device
def test_a_crosscoders_splice(device):
    tokens, model, sae = (
        some_tokens(),
        hooked_model("llama", n_layers=N_LAYERS),
        new_sae("crosscoder"),
    )
    expected = run_edited(model, sae, tokens, reconstruct(sae))
    with pretend_gpus():
        there = on(new_sae("crosscoder"), device)
        found = run_edited(spread_model(), there, placed(tokens, "meta:0"), reconstruct(there))
    assert not torch.equal(expected, model(tokens))
    close(found, expected)


@every_sae_device
def test_an_added_sae_waits_for_its_tokens_per_block_and_for_nothing_else(device):
    """L counts are read once per pass, whatever the number of tokens and blocks."""
    for shape in ((2, 7), (3, 30)):
        tokens, model, sae = some_tokens(*shape), hooked_model("llama", n_layers=8), new_sae("hard")
        with attach(model, sae) as hook, model.saes(saes=[sae]):
            expected = model(tokens)
            assert hook.routing is not None
        model, there = spread_model(), on(new_sae("hard"), device)
        with pretend_gpus() as waits, attach(model, there), model.saes(saes=[there]):
            waits.clear()
            found = model(placed(tokens, "meta:0"))
        assert waits == {"bincount": 1, "_to_copy meta to cpu": 1}
        close(values(found), expected)


@every_sae_device
def test_a_pass_that_only_reads_waits_for_nothing(device):
    tokens, model, there = some_tokens(), spread_model(), on(new_sae("hard"), device)
    clean = hooked_model("llama", n_layers=N_LAYERS)(tokens)
    with pretend_gpus() as waits, attach(model, there) as hook:
        logits, cache = model.run_with_cache(placed(tokens, "meta:0"), names_filter=[hook.name])
        assert str(cache[hook.name].device) == device
    assert waits == {}
    assert torch.equal(values(logits), clean)


@every_sae_device
@pytest.mark.parametrize("kind", ["hard", "soft", "crosscoder"])
def test_an_evaluation(device, kind):
    tokens, sae = some_tokens(6, 7), new_sae(kind)
    tokens[0, 3] = 5
    model = hooked_model("llama", n_layers=N_LAYERS)
    expected = evaluate_all(model, {"a": sae}, tokens, batch_size=2, unscaled=True)["a"]
    with pretend_gpus():
        found = evaluate_all(
            spread_model(), {"a": on(new_sae(kind), device)}, tokens, batch_size=2, unscaled=True
        )["a"]
    assert_same(found.to_dict(), expected.to_dict())


def assert_same(found, expected):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_same(found[name], value)
    else:
        assert found == (None if expected is None else pytest.approx(expected, rel=1e-8, abs=1e-10))


def test_streams_are_read_onto_one_device():
    tokens, sae = some_tokens(6, 7), new_sae("hard")
    model = hooked_model("llama", n_layers=N_LAYERS)
    expected = [batch.activations for batch in activation_batches(model, sae, tokens)]
    with pretend_gpus():
        found = list(activation_batches(spread_model(), on(new_sae("hard"), "meta:1"), tokens))
    assert {str(batch.activations.device) for batch in found} == {"meta:0"}
    for batch, streams in zip(found, expected, strict=True):
        assert torch.equal(values(batch.activations), streams)
