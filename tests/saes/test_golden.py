"""Routing, SAE, loss, gradients and training against the reference implementation's numbers.

Tolerances: 1e-5 relative for float32 formulas evaluated in another order, 1e-4 for gradients and
for parameters after optimizer steps (Adam divides small gradients by small roots of squares).
Latents compare after `relu`, as SAELens's TopK applies it and the reference does not.
"""

import json

import pytest
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.optim import get_lr_scheduler
from sae_lens.training.sae_trainer import SAETrainer
from support.golden import FOLDER, golden_sae, load, to_ours

from sae_lens_route.config import lr_schedule_steps
from sae_lens_route.saes.router import normalization_stats, normalize

SEEDS = (0, 1)
VARIANTS = {
    "hard_sum": {"routing": "hard", "aggregation": "sum"},
    "hard_mean": {"routing": "hard", "aggregation": "mean"},
    "soft_sum": {"routing": "soft", "aggregation": "sum"},
}


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(
        actual, torch.as_tensor(expected), rtol=tolerance, atol=tolerance, check_dtype=False
    )


def step_input(x, step=0):
    return TrainStepInput(
        sae_in=x,
        coefficients={},
        dead_neuron_mask=None,
        n_training_steps=step,
        is_logging_step=False,
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_normalization(seed):
    tensors, _ = load(f"seed{seed}_route")
    x = tensors["x_raw"][0]
    mean, scale = normalization_stats(x)
    close(normalize(x), tensors["pre.x"])
    close(mean, tensors["pre.mean"].squeeze(-1))
    close(scale - 1e-6, tensors["pre.std"].squeeze(-1))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", SEEDS)
def test_routing_sae_and_loss(seed, variant):
    tensors, info = load(f"seed{seed}_route")
    sae = golden_sae(tensors, info, **VARIANTS[variant])
    x = tensors["x_raw"][0]
    routing = sae.route(x)
    close(routing.probs, tensors[f"{variant}.router_weights"])
    assert torch.equal(routing.route, tensors[f"{variant}.argmax_layer"])
    close(routing.x_route, tensors[f"{variant}.routed_x"])

    expected = tensors[f"{variant}.latents"]
    latents = sae.encode(routing.x_route)
    close(latents, expected.relu())
    negative_part = expected.clamp(max=0) @ sae.W_dec
    close(sae.decode(latents), tensors[f"{variant}.x_hat"] - negative_part)
    if not (expected < 0).any():
        output = sae.training_forward_pass(step_input(x.flatten(0, 1)))
        close(output.loss, info[f"{variant}.loss"])
        mse = golden_sae(tensors, info, **VARIANTS[variant], loss="mse")
        output = mse.training_forward_pass(step_input(x.flatten(0, 1)))
        close(output.loss, info[f"{variant}.eq12_sum_sq_mean_over_tokens"])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", SEEDS)
def test_gradients(seed, variant):
    tensors, info = load(f"seed{seed}_route")
    assert not (tensors[f"{variant}.latents"] < 0).any(), "relu would cut a gradient"
    sae = golden_sae(tensors, info, **VARIANTS[variant])
    sae.training_forward_pass(step_input(tensors["x_raw"][0].flatten(0, 1))).loss.backward()
    for name, gradient in to_ours(tensors, f"{variant}.grad.").items():
        close(getattr(sae, name).grad, gradient, 1e-4)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("k_name", ["infer_k", "infer_k_large"])
def test_other_k_at_inference(seed, k_name):
    tensors, info = load(f"seed{seed}_route")
    sae = golden_sae(tensors, {**info, "k": info[k_name]})
    expected = tensors[f"hard_sum.{k_name}.latents"]
    latents = sae.encode_layers(tensors["x_raw"][0])
    close(latents, expected.relu())
    x_hat = tensors[f"hard_sum.{k_name}.x_hat"] - expected.clamp(max=0) @ sae.W_dec
    close(sae.decode(latents), x_hat)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("run", ["trainA", "trainB"])
def test_optimizer_steps_with_decoder_norm(seed, run, monkeypatch):
    """SAELens's own trainer repeats the reference's steps.

    Its gradient clipping, which the reference lacks, is switched off, and for trainB the warm-up
    gets the reference's multipliers: SAELens's first step has rate lr/w, not 0.
    """
    tensors, info = load(f"seed{seed}_route")
    plan = info[run]
    n = plan["total_steps"]
    sae = golden_sae(tensors, info, decoder_norm_interval=plan["norm_interval"])
    batches = [tensors["x_raw"][i].flatten(0, 1) for i in plan["batch_order"]]
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=n * len(batches[0]),
            train_batch_size_samples=len(batches[0]),
            lr=plan["lr"],
            lr_end=plan["lr"],
            lr_warm_up_steps=0,
            lr_decay_steps=n // 5 if run == "trainB" else 0,
        ),
        sae=sae,
        data_provider=iter(batches),
    )
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: None)
    losses, counts = [], torch.zeros(9)
    for step, batch in enumerate(batches):
        if step < plan["warmup_steps"]:
            trainer.optimizer.param_groups[0]["lr"] = plan["lr"] * step / plan["warmup_steps"]
        output = trainer.step(batch)
        if step < plan["warmup_steps"]:
            trainer.optimizer.param_groups[0]["lr"] = plan["lr"]
        trainer.n_training_steps += 1
        losses.append(output.loss.item())
        shares = [output.metrics[f"route_share/route_{i}"]() for i in range(9)]
        counts += torch.tensor(shares) * len(batch)
    sae.normalize_decoder()
    close(torch.tensor(losses), plan["losses"], 1e-4)
    close(counts, plan["layer_counts"], 1e-4)
    for name, parameter in to_ours(tensors, f"{run}.param.").items():
        close(getattr(sae, name), parameter, 1e-4)


@pytest.mark.parametrize("n", ["200", "100", "37", "19", "7", "5"])
def test_learning_rate_schedule(n):
    """The reference's warm-up and decay lengths and multipliers, exactly.

    One difference is kept: the reference's first step has rate 0, so its warm-up multiplier at
    step t + 1 is SAELens's at step t.
    """
    expected = json.loads((FOLDER / "public" / "lr_multipliers.json").read_text())[n]
    warm_up, decay = lr_schedule_steps(int(n))
    assert (warm_up, decay) == (expected["warmup_steps"], expected["decay_steps"])
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = get_lr_scheduler(
        "constant", optimizer, int(n), 1.0, warm_up, decay, lr_end=0.1, num_cycles=1
    )
    ours = []
    for _ in range(int(n)):
        ours.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    theirs = expected["multiplier_used_at_step"]
    assert ours[warm_up:] == pytest.approx(theirs[warm_up:], abs=1e-12)
    assert ours[:warm_up] == pytest.approx(theirs[1 : warm_up + 1], abs=1e-12)
