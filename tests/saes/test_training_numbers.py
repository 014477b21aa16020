"""What training reports and what it optimizes, against loops over tokens in float64.

Tolerances: both sides are float64, so values agree to 1e-9 (`support/brute_force.py`), except
`route_share`, a mean that is taken in float32 of exact ones and zeros.
"""

import math

import pytest
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.sae_trainer import SAETrainer
from support.architectures import a_step, random_sae, random_streams
from support.brute_force import TOLERANCE, mean, routed

from sae_lens_route.saes import MultiLayerTopKTrainingConfig, MultiLayerTopKTrainingSAE

N_TOKENS, BLOCKS = 40, [2, 5, 9]


def numbers(metrics):
    return {name: float(value()) if callable(value) else value for name, value in metrics.items()}


@pytest.mark.parametrize("aggregation", ["sum", "mean"])
@pytest.mark.parametrize("routing", ["hard", "soft"])
def test_route_metrics(routing, aggregation):
    sae, x = random_sae("topk", routing=routing, aggregation=aggregation), random_streams(N_TOKENS)
    sae.cfg.metadata = SAEMetadata(routed_blocks=BLOCKS)
    found = numbers(sae.training_forward_pass(a_step(x)).metrics)
    at = [routed(sae, list(token), None) for token in x.numpy()]
    for i, block in enumerate(BLOCKS):
        share = mean([float(r.route == i) for r in at])
        assert 0 < share < 1
        assert found[f"route_share/block_{block}"] == pytest.approx(share, rel=1e-6)
    assert found["route_weight"] == pytest.approx(mean([r.weight for r in at]), rel=TOLERANCE)
    probs = [mean([r.probs[i] for r in at]) for i in range(3)]
    entropy = -math.fsum(p * math.log(p) for p in probs)
    assert found["route_entropy"] == pytest.approx(entropy, rel=TOLERANCE)


def trained(sae, batches):
    """SAELens's own trainer, a feature being dead after two steps without firing."""
    config = SAETrainerConfig(
        total_training_samples=len(batches) * N_TOKENS,
        train_batch_size_samples=N_TOKENS,
        dead_feature_window=2,
        lr=0.0,
        lr_end=0.0,
    )
    return SAETrainer(config, sae, iter(batches))


def auxiliary_loss(sae, x, dead):
    """SAELens's loss for dead features, relative to the mean squared norm of x_route.

    The k_aux = d / 2 strongest of the dead features reconstruct what the others left.
    """
    x_route = sae.route(x).x_route.detach()
    pre = (x_route - sae.b_dec) @ sae.W_enc + sae.b_enc
    acts = pre.relu() * (pre >= pre.topk(sae.cfg.k).values[:, -1:])
    residual = x_route - acts @ sae.W_dec - sae.b_dec
    features = dead.nonzero().flatten().tolist()
    n_aux = min(x.shape[-1] // 2, len(features))
    scale = min(len(features) / (x.shape[-1] // 2), 1.0)
    total = 0.0
    for t in range(len(x)):
        strongest = sorted(features, key=lambda f: -float(pre[t, f].detach()))[:n_aux]
        rebuilt = sum(pre[t, f] * sae.W_dec[f] for f in strongest)
        total = total + (rebuilt - residual[t]).pow(2).sum() / len(x)
    return scale * total / x_route.pow(2).sum(-1).mean()


def test_dead_features_of_the_trainer_reach_the_auxiliary_loss():
    """Features 0 and 4 cannot fire: once the window is over, they and a few others are the mask."""
    sae = random_sae("topk", router_objective="frozen", aux_loss_coefficient=1.0)
    sae.b_enc.data[[0, 4]] = -50.0
    trainer = trained(sae, [random_streams(N_TOKENS, seed=seed) for seed in range(4)])
    losses = []
    for batch in trainer.data_provider:
        dead = trainer.dead_neurons
        losses.append(float(trainer.step(batch).losses["auxiliary_reconstruction_loss"]))
    assert {0, 4} <= set(dead.nonzero().flatten().tolist()) and not dead.all()
    assert losses[:3] == [0, 0, 0] and losses[3] > 0
    expected = auxiliary_loss(sae, random_streams(N_TOKENS, seed=3), dead)
    # the residual is that of the step, whose learning rate is 0
    assert losses[3] == pytest.approx(float(expected.detach()), rel=TOLERANCE)


def test_the_auxiliary_loss_trains_the_dead_features():
    sae = random_sae("topk", router_objective="frozen", aux_loss_coefficient=1.0)
    sae.b_enc.data[[0, 4]] = -50.0
    dead = torch.zeros(12, dtype=torch.bool)
    dead[[0, 4]] = True
    sae.training_forward_pass(a_step(random_streams(N_TOKENS), dead)).loss.backward()
    assert (sae.b_enc.grad[[0, 4]] != 0).all()
    assert (sae.W_dec.grad[[0, 4]] != 0).any(1).all()


def test_a_multi_layer_sae_trains_on_the_streams_of_every_block():
    """Loss and every gradient against a loss that is summed over tokens and blocks by hand."""
    torch.manual_seed(0)
    sae = MultiLayerTopKTrainingSAE(
        MultiLayerTopKTrainingConfig(
            d_in=6, d_sae=12, k=3, n_routed_layers=3, dtype="float64", decoder_norm_interval=0
        )
    )
    for parameter in sae.parameters():
        parameter.data.normal_()
    x = random_streams(7)
    sae.training_forward_pass(a_step(x)).loss.backward()
    found = {name: p.grad for name, p in sae.named_parameters() if p.grad is not None}

    parameters = {name: getattr(sae, name).detach().requires_grad_() for name in found}
    errors = []
    for token in x:
        for h in token:
            n = (h - h.mean()) / (((h - h.mean()) ** 2).sum() / 5).sqrt().add(1e-6)
            pre = (n - parameters["b_dec"]) @ parameters["W_enc"] + parameters["b_enc"]
            strongest = sorted(range(12), key=lambda f, pre=pre: -float(pre[f].detach()))[:3]
            x_hat = parameters["b_dec"]
            for f in strongest:
                x_hat = x_hat + pre[f].relu() * parameters["W_dec"][f]
            errors.append((x_hat - n).pow(2).sum() / n.pow(2).sum())
    assert len(errors) == 7 * 3
    (sum(errors) / len(errors)).backward()
    assert set(found) == {"W_enc", "b_enc", "W_dec", "b_dec"}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, parameters[name].grad, rtol=TOLERANCE, atol=1e-12)
