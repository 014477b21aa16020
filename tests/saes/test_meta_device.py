"""Without a GPU: no step reads a number back from the device, and nothing mixes devices.

A tensor on PyTorch's `meta` device has a shape and no values, so whatever needs a value on the host
raises: `.item()`, `if tensor:`, `nonzero`, selecting by a mask, mixing with the CPU. The package
computes there as it does on a GPU. Where values decide what happens (`support/devices.py`), tensors
that only claim to be elsewhere are used, and what a host would wait for is counted.
"""

import pytest
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from support.architectures import ARCHITECTURES, a_step, random_sae, random_streams
from support.devices import place_module, placed, pretend_gpus
from support.splice import hooked_model, route_sae, some_tokens

from sae_lens_route import saes
from sae_lens_route.evals.reconstruction import CrosscoderSums, ReconstructionSums
from sae_lens_route.saes.router import draw_routes
from sae_lens_route.splice import attach

TOKENS, BLOCKS, D = 32, 3, 6
ROUTINGS = {
    "hard": {"routing": "hard"},
    "attention": {"aggregation": "attention"},
    "soft": {"routing": "soft"},
    "uniform": {"routing": "uniform"},
    "shares": {"routing": "uniform", "route_shares": [0.5, 0.2, 0.3]},
}
OPTIONS = {
    **ROUTINGS,
    "assignment": {"router_objective": "assignment"},
    "frozen": {"router_objective": "frozen"},
    "mse": {"loss": "mse"},
    "decoder norm": {"decoder_norm_interval": 1},
}
DEAD_FEATURE_LOSSES = {
    "topk": {"aux_loss_coefficient": 1 / 32},
    "batchtopk": {"aux_loss_coefficient": 1 / 32},
    "matryoshka_batchtopk": {"aux_loss_coefficient": 1 / 32, "use_matryoshka_aux_loss": True},
    "jumprelu": {"pre_act_loss_coefficient": 1 / 32},
}
STACKED = {
    "multi_layer_topk": saes.MultiLayerTopKTrainingSAE,
    "crosscoder": saes.TrainingCrosscoder,
    "crosscoder_topk": saes.TopKTrainingCrosscoder,
}


def stacked_sae(name):
    """A small multi-layer SAE or crosscoder."""
    torch.manual_seed(0)
    width = D if name == "multi_layer_topk" else BLOCKS * D
    sizes = {"d_in": width, "d_sae": 12, "n_routed_layers": BLOCKS, "dtype": "float64"}
    k = {} if name == "crosscoder" else {"k": 3}
    config = {
        "multi_layer_topk": saes.MultiLayerTopKTrainingConfig,
        "crosscoder": saes.TrainingCrosscoderConfig,
        "crosscoder_topk": saes.TopKTrainingCrosscoderConfig,
    }[name]
    return STACKED[name](config(**sizes, **k))


def every_sae():
    """Every architecture with every option, by name."""
    for architecture in ARCHITECTURES:
        for name, options in OPTIONS.items():
            yield f"{architecture}, {name}", lambda a=architecture, o=options: random_sae(a, **o)
    for architecture, options in DEAD_FEATURE_LOSSES.items():
        name = f"{architecture}, loss for dead features"
        yield name, lambda a=architecture, o=options: random_sae(a, **o)
    for name in STACKED:
        yield name, lambda name=name: stacked_sae(name)


EVERY_SAE = dict(every_sae())
every_sae_made = pytest.mark.parametrize("make_sae", EVERY_SAE.values(), ids=EVERY_SAE)


@every_sae_made
def test_saelens_trainer_steps_on_meta(make_sae):
    sae = make_sae().to("meta")
    config = SAETrainerConfig(
        total_training_samples=2 * TOKENS,
        train_batch_size_samples=TOKENS,
        device="meta",
        lr=1e-3,
        lr_end=0.0,
        lr_decay_steps=1,
    )
    trainer = SAETrainer(config, sae, iter(()))
    for _ in range(2):
        output = trainer.step(torch.empty(TOKENS, BLOCKS, D, device="meta"))
        trainer.n_training_steps += 1
    assert output.loss.device.type == "meta"
    assert all(state for state in trainer.optimizer.state.values())


@pytest.mark.parametrize("options", ROUTINGS.values(), ids=ROUTINGS)
def test_routing_on_meta(options):
    sae = random_sae("topk", **options).to("meta")
    routing = sae.route(torch.empty(2, 5, BLOCKS, D, device="meta"))
    assert {part.device.type for part in routing} == {"meta"}
    assert routing.probs.shape == (2, 5, BLOCKS)
    assert routing.route.shape == routing.weight.shape == (2, 5)
    assert routing.x_route.shape == (2, 5, D)


def test_values_are_needed_where_they_are_read():
    """Meta tensors do raise: the check of these tests."""
    with pytest.raises((RuntimeError, NotImplementedError)):
        draw_routes(torch.Size([4]), BLOCKS, None, None, torch.device("meta")).tolist()
    sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=D, d_sae=12, k=3)).to("meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        sae.training_forward_pass(a_step(torch.empty(TOKENS, D, device="meta")))


@pytest.mark.parametrize("name", [name for name in EVERY_SAE if "crosscoder" not in name])
def test_reconstruction_sums_on_meta(name):
    sae = EVERY_SAE[name]()
    sae.cfg.metadata.routed_blocks = list(range(BLOCKS))
    sums = ReconstructionSums(sae.to("meta"))
    with torch.no_grad():
        for _ in range(2):
            sums.add(torch.empty(TOKENS, BLOCKS, D, device="meta"))
    assert {total.device.type for total in sums.totals.values()} == {"meta"}


@pytest.mark.parametrize("name", ["crosscoder", "crosscoder_topk"])
def test_crosscoder_sums_on_meta(name):
    sae = stacked_sae(name)
    sae.cfg.metadata.routed_blocks = list(range(BLOCKS))
    sums = CrosscoderSums(sae.to("meta"))
    with torch.no_grad():
        for _ in range(2):
            sums.add(torch.empty(TOKENS, BLOCKS, D, device="meta"))
    assert {total.device.type for total in sums.totals.values()} == {"meta"}


@pytest.mark.parametrize("routing", ["hard", "soft", "uniform"])
def test_reading_the_routed_hook_on_meta(routing):
    """A pass that reads and does not edit computes nothing on the host."""
    model, sae = hooked_model("llama").to("meta"), route_sae([2, 4, 5], routing=routing).to("meta")
    with attach(model, sae) as hook:
        logits, cache = model.run_with_cache(some_tokens().to("meta"), names_filter=[hook.name])
    assert logits.device.type == "meta"
    assert cache[hook.name].shape == (2, 7, sae.cfg.d_in)


def step(sae, x, dead):
    """Loss and gradients of a step that is not logged."""
    output = sae.training_forward_pass(a_step(x, dead))
    output.loss.backward()
    return output.loss.detach(), {n: p.grad for n, p in sae.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", [n for n in EVERY_SAE if "uniform" not in n and "shares" not in n])
def test_a_step_waits_for_nothing_and_has_the_numbers_of_the_cpu(name):
    """On devices other than the CPU another formula of the moments runs: equal to rounding."""
    dead = torch.arange(12) % 6 == 1
    loss, gradients = step(EVERY_SAE[name](), random_streams(TOKENS), dead)
    sae, on_gpu = EVERY_SAE[name](), placed(dead, "meta:0")
    place_module(sae, "meta:0")
    with pretend_gpus() as waits:
        found, placed_gradients = step(sae, placed(random_streams(TOKENS), "meta:0"), on_gpu)
    assert waits == {}
    torch.testing.assert_close(found.values, loss, rtol=1e-9, atol=1e-12)
    for parameter, gradient in gradients.items():
        there = placed_gradients[parameter]
        assert (there is None) == (gradient is None), parameter
        if gradient is not None:
            torch.testing.assert_close(there.values, gradient, rtol=1e-8, atol=1e-10)


def waits_of(sae, x, dead=None):
    """Of a step that is not logged, on a device that is not there."""
    place_module(sae, "meta:0")
    with pretend_gpus() as waits:
        sae.training_forward_pass(a_step(placed(x, "meta:0"), dead)).loss.backward()
    return waits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("options", [ROUTINGS["uniform"], ROUTINGS["shares"]], ids=str)
def test_uniform_routing_waits_for_nothing_after_its_first_step(architecture, options):
    """The first step copies the shares to the device."""
    sae, x = random_sae(architecture, **options), random_streams(TOKENS)
    assert sum(waits_of(sae, x).values()) == ("route_shares" in options)
    assert waits_of(sae, x) == {}


def test_saelens_own_topk_waits_for_the_device():
    """The control of these tests: what is counted."""
    sae, x = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D, d_sae=12, k=3)), random_streams(TOKENS)
    assert waits_of(sae, x[:, 0]) == {"_to_copy cpu to meta": 1}
    dead = placed(torch.arange(12) < 4, "meta:0")
    assert waits_of(sae, x[:, 0], dead) == {"_local_scalar_dense": 1}


def test_a_selection_by_a_mask_is_counted():
    x = placed(torch.tensor([1.0, -1.0, 2.0]), "meta:0")
    with pretend_gpus() as waits:
        assert x[x > 0].shape == (2,)
        assert bool((x > 0).any())
    assert waits == {"index": 1, "_local_scalar_dense": 1}


def test_mixing_devices_raises():
    here, there = (placed(torch.ones(3), f"meta:{i}") for i in range(2))
    with pretend_gpus():
        assert torch.stack([here, there.to(here.device)]).device == here.device
        for mixed in (lambda: here + there, lambda: torch.stack([here, there])):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        with pytest.raises(RuntimeError, match="same device"):
            here + torch.ones(3)
