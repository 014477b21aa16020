"""The crosscoder against explicit sums over blocks.

In float64. Tolerances, relative and absolute: 1e-12 for one pass through the SAE, 1e-6 for
gradients against central differences.
"""

import json
import math

import pytest
import torch
from sae_lens import SAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.registry import get_sae_class, get_sae_training_class
from sae_lens.saes.sae import SAEMetadata, TrainingSAE
from sae_lens.training.sae_trainer import SAETrainer
from support.crosscoders import (
    CLASSES,
    WIDTH,
    K,
    L,
    M,
    crosscoder,
    explicit_codes,
    explicit_decode,
    explicit_normed,
    streams,
    training_output,
)
from support.splice import close

from sae_lens_route.saes.metadata import crosscoder_hook_name
from sae_lens_route.saes.registration import register
from sae_lens_route.saes.router import normalization_stats

pytestmark = pytest.mark.usefixtures("no_gradients")

NAME = crosscoder_hook_name(4)
HOOKS = [f"blocks.{block}.hook_resid_post" for block in (1, 2, 4)]


# --- the dictionary ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("pre_bias", [False, True])
def test_encode_and_decode_are_sums_over_blocks(kind, pre_bias):
    sae, x = crosscoder(kind, apply_b_dec_to_input=pre_bias), streams()
    h, codes = sae.concat_blocks(x), explicit_codes(sae, x)
    assert 0 < (codes > 0).sum() < codes.numel()
    expected = explicit_decode(sae, codes, L, WIDTH)
    close(h, explicit_normed(x).reshape(len(x), -1), 1e-12)
    close(sae.encode(h), codes, 1e-12)
    close(sae.encode_layers(x), codes, 1e-12)
    close(sae(h), expected.reshape(len(x), -1), 1e-12)
    mean, scale = normalization_stats(x)
    close(
        sae.split_blocks(sae(h), mean, scale),
        expected * (x.std(-1, keepdim=True) + 1e-6) + x.mean(-1, keepdim=True),
        1e-12,
    )
    close(sae.split_blocks(h, mean, scale), x, 1e-12)
    close(sae.encode_layers(x.view(1, 11, 1, L, WIDTH)), codes.view(1, 11, 1, M), 1e-12)


def test_lindseys_crosscoder_subtracts_no_bias_from_its_input():
    for kind, expected in (("relu", False), ("topk", True)):
        assert crosscoder(kind).cfg.apply_b_dec_to_input is expected
        assert crosscoder(f"{kind}, training").cfg.apply_b_dec_to_input is expected


@pytest.mark.parametrize("kind", ["relu, training", "topk, training"])
def test_the_initialization(kind):
    cls, config = CLASSES[kind]
    sae = cls(
        config(d_in=L * WIDTH, d_sae=M, n_routed_layers=L, **({"k": K} if "k" in kind else {}))
    )
    close(sae.W_dec.norm(dim=-1), torch.ones(M), 1e-6)
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    close(sae.decoder_block_norms().pow(2).sum(-1), torch.ones(M), 1e-6)
    assert not sae.b_enc.any() and not sae.b_dec.any()


# --- the loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["relu, training", "topk, training"])
def test_the_loss_is_the_mean_over_blocks_of_norm_mse(kind):
    """Each block's error over its own squared norm: to 1e-6, as the eps of the scale is 1e-6."""
    sae, x = crosscoder(kind), streams()
    x_hat = explicit_decode(sae, explicit_codes(sae, x), L, WIDTH)
    normed, total = explicit_normed(x), 0.0
    for t in range(len(x)):
        for i in range(L):
            error = float((normed[t, i] - x_hat[t, i]).pow(2).sum())
            total += error / float(normed[t, i].pow(2).sum()) / L / len(x)
    output = training_output(sae, x)
    assert float(output.losses["mse_loss"]) == pytest.approx(total, rel=1e-6)
    assert output.sae_in.shape == output.sae_out.shape == (len(x), L * WIDTH)
    # and exactly what it is by construction
    error = (normed - x_hat).pow(2).sum((-1, -2)) / normed.pow(2).sum((-1, -2))
    close(output.losses["mse_loss"], error.mean(), 1e-12)


@pytest.mark.parametrize("l1_norm", ["decoder", "none"])
def test_the_sparsity_penalty(l1_norm):
    sae, x = crosscoder("relu, training", l1_norm=l1_norm), streams()
    codes, total = explicit_codes(sae, x), 0.0
    for t in range(len(x)):
        for j in range(M):
            norms = [float(sae.W_dec[j, i * WIDTH : (i + 1) * WIDTH].norm()) for i in range(L)]
            weight = sum(norms) if l1_norm == "decoder" else 1 / M
            total += float(codes[t, j]) * weight / len(x)
    output = training_output(sae, x, l1=0.3)
    assert float(output.losses["l1_loss"]) == pytest.approx(0.3 * total, rel=1e-12)
    assert float(output.loss) == pytest.approx(float(sum(output.losses.values())), rel=1e-12)


def explicit_loss(sae, x, l1):
    codes = explicit_codes(sae, x)
    error = explicit_normed(x) - explicit_decode(sae, codes, L, WIDTH)
    loss = error.pow(2).sum((-1, -2)) / explicit_normed(x).pow(2).sum((-1, -2))
    if "topk" not in sae.cfg.architecture():
        norms = sae.W_dec.view(M, L, WIDTH).pow(2).sum(-1).sqrt().sum(-1)
        penalty = (codes * norms).sum(-1) if sae.cfg.l1_norm == "decoder" else codes.mean(-1)
        loss = loss + l1 * penalty
    return loss.mean()


@pytest.mark.parametrize(
    "kind, options",
    [
        ("relu, training", {}),
        ("relu, training", {"l1_norm": "none"}),
        ("relu, training", {"apply_b_dec_to_input": True}),
        ("topk, training", {}),
        ("topk, training", {"apply_b_dec_to_input": False}),
    ],
)
@torch.enable_grad()
def test_gradients_against_central_differences(kind, options):
    """Every entry of every parameter; differences of the explicit loss, so the loss is checked too.

    Steps of 1e-6 stay on one side of every kink: the same latents are active at both ends.
    """
    sae, x, l1 = crosscoder(kind, **options), streams(), 0.02
    training_output(sae, x, l1).loss.backward()
    with torch.no_grad():
        active = explicit_codes(sae, x) > 0
        for name, parameter in sae.named_parameters():
            expected = torch.zeros_like(parameter)
            for index in range(parameter.numel()):
                entry = parameter.view(-1)[index : index + 1]
                values = []
                for step in (1e-6, -2e-6):
                    entry += step
                    assert torch.equal(explicit_codes(sae, x) > 0, active)
                    values.append(explicit_loss(sae, x, l1))
                entry += 1e-6
                expected.view(-1)[index] = (values[0] - values[1]) / 2e-6
            assert expected.abs().max() > 1e-4, name
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-6, atol=1e-8)


# --- training, saving, loading -------------------------------------------------------------------


def trained(kind, steps=60, **options):
    """A float32 crosscoder trained on streams that three sparse factors make."""
    torch.manual_seed(0)
    cls, config = CLASSES[kind]
    extra = {"k": K} if kind.startswith("topk") else {"l1_warm_up_steps": 10}
    metadata = SAEMetadata(hook_name=NAME, hook_names=HOOKS)
    sae = cls(
        config(
            d_in=L * WIDTH, d_sae=M, n_routed_layers=L, metadata=metadata, **{**extra, **options}
        )
    )
    cfg = SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=steps * 64,
        device="cpu",
        autocast=False,
        lr=3e-3,
        lr_end=3e-4,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=0,
        n_restart_cycles=1,
        train_batch_size_samples=64,
        dead_feature_window=1000,
        feature_sampling_window=1000,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(cfg, sae, iter(()))
    factors = torch.randn(6, L, WIDTH)
    losses = []
    with torch.enable_grad():
        for _ in range(steps):
            amounts = torch.rand(64, 6) * (torch.rand(64, 6) < 0.3)
            batch = torch.einsum("tf,fld->tld", amounts, factors)
            batch = batch + 0.05 * torch.randn_like(batch)
            losses.append(trainer.step(batch.half()).losses["mse_loss"].item())
            trainer.n_training_steps += 1
    return sae, losses


@pytest.mark.parametrize("kind", ["relu, training", "topk, training"])
def test_training_saving_and_loading(kind, tmp_path):
    sae, losses = trained(kind)
    assert losses[-1] < losses[0] / 2
    sae.save_inference_model(tmp_path / "sae")
    loaded = SAE.load_from_disk(tmp_path / "sae")
    assert type(loaded) is CLASSES[kind.split(",")[0]][0]
    assert (loaded.cfg.n_routed_layers, loaded.cfg.d_in, loaded.cfg.d_model) == (
        L,
        L * WIDTH,
        WIDTH,
    )
    assert loaded.cfg.metadata.hook_names == HOOKS
    x = streams().float()
    assert torch.equal(loaded.encode_layers(x), sae.encode_layers(x))
    assert torch.equal(loaded(loaded.concat_blocks(x)), sae(sae.concat_blocks(x)))
    cfg = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    assert cfg["architecture"] == ("crosscoder_topk" if "topk" in kind else "crosscoder")

    sae.save_model(tmp_path / "checkpoint")  # a checkpoint, from which training resumes
    again = TrainingSAE.load_from_disk(tmp_path / "checkpoint")
    assert type(again) is type(sae) and again.cfg.to_dict() == sae.cfg.to_dict()
    assert torch.equal(again.encode_layers(x), sae.encode_layers(x))
    fresh = TrainingSAE.from_dict(sae.cfg.to_dict())
    assert type(fresh) is type(sae)
    assert math.isfinite(training_output(fresh, x).loss.item())


def test_rows_of_norm_one_with_saelens_rescaling(tmp_path):
    sae, _ = trained("topk, training", steps=10, rescale_acts_by_decoder_norm=True)
    sae.save_inference_model(tmp_path)
    loaded, x = SAE.load_from_disk(tmp_path), streams().float()
    close(loaded.W_dec.norm(dim=-1), torch.ones(M), 1e-5)
    close(loaded.encode_layers(x), sae.encode_layers(x), 1e-5)


def test_folding_the_decoder_norm():
    """Folding leaves a crosscoder with ReLU as it was; with TopK it would change what is on top."""
    for kind in ("relu", "relu, training"):
        sae, x = crosscoder(kind), streams()
        before, norms = sae(sae.concat_blocks(x)), sae.W_dec.norm(dim=-1)
        codes = sae.encode_layers(x)
        sae.fold_W_dec_norm()
        close(sae(sae.concat_blocks(x)), before, 1e-12)
        close(sae.encode_layers(x), codes * norms, 1e-12)
        close(sae.W_dec.norm(dim=-1), torch.ones(M, dtype=torch.float64), 1e-12)
    with pytest.raises(NotImplementedError, match="rescale_acts_by_decoder_norm"):
        crosscoder("topk").fold_W_dec_norm()


def test_saelens_knows_the_architectures():
    for architecture, kind in (("crosscoder", "relu"), ("crosscoder_topk", "topk")):
        for _ in range(2):
            assert get_sae_class(architecture) == CLASSES[kind]
            assert get_sae_training_class(architecture) == CLASSES[f"{kind}, training"]
            register(*CLASSES[f"{kind}, training"], *CLASSES[kind])  # autoreload


@pytest.mark.parametrize(
    "kind, options, message",
    [
        ("relu", {"d_in": 25}, r"d_in=25: must be n_routed_layers=3 times"),
        ("topk", {"d_in": 25}, r"d_in=25: must be n_routed_layers=3 times"),
        ("relu, training", {"n_routed_layers": 0}, "n_routed_layers=0"),
        ("relu", {"normalize_activations": "layer_norm"}, "normalize_activations='layer_norm'"),
        ("relu", {"reshape_activations": "hook_z"}, "reshape_activations='hook_z'"),
        ("topk", {"k": 41}, "k=41: must be between 1 and d_sae=40"),
        ("topk, training", {"k": 0}, "k=0"),
        ("relu, training", {"l1_norm": "rows"}, "l1_norm='rows': must be one of 'decoder', 'none'"),
        ("relu, training", {"l1_coefficient": -1.0}, "l1_coefficient=-1.0"),
        ("relu, training", {"lp_norm": 2.0}, "lp_norm=2.0"),
    ],
)
def test_bad_options(kind, options, message):
    fields = {"d_in": 24, "d_sae": M, "n_routed_layers": 3, **options}
    if kind.startswith("topk"):
        fields = {"k": K, **fields}
    with pytest.raises(ValueError, match=message):
        CLASSES[kind][1](**fields)


def test_streams_of_another_shape():
    with pytest.raises(ValueError, match=r"\[\.\.\., 3, 8\], got \[11, 2, 8\]"):
        crosscoder().concat_blocks(streams()[:, :2])
    with pytest.raises(ValueError, match=r"got \[11, 24\]"):
        crosscoder().encode_layers(streams().flatten(1))
