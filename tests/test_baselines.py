"""The crosscoder against explicit sums over layers, and its splice against two plain passes.

All in float64. Tolerances, relative and absolute: 1e-12 for one pass through the SAE, 1e-9 for a
model, 1e-6 for gradients against central differences. The brute force shares no code with the
package but `decoder_blocks`.
"""

import json
import math

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE, HookedSAETransformer
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.registry import get_sae_class, get_sae_training_class
from sae_lens.saes.sae import SAEMetadata, TrainingSAE, TrainStepInput
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.sae_trainer import SAETrainer
from test_splice import (
    KINDS,
    VOCAB,
    D,
    block_calls,
    clean_streams,
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
from test_splice_generation import CachedSteps, greedy

from sae_lens_route import baselines
from sae_lens_route.baselines import (
    Crosscoder,
    CrosscoderConfig,
    TopKCrosscoder,
    TopKCrosscoderConfig,
    TopKTrainingCrosscoder,
    TopKTrainingCrosscoderConfig,
    TrainingCrosscoder,
    TrainingCrosscoderConfig,
)
from sae_lens_route.models import decoder_blocks
from sae_lens_route.router import normalization_stats
from sae_lens_route.splice import RouteSAETransformer, attach

L, WIDTH, M, K = 3, 8, 40, 5
ROUTED = [1, 2, 4]  # block 3 lies between them and is not read
NAME = "blocks.4.hook_resid_stack"
CLASSES = {
    "relu": (Crosscoder, CrosscoderConfig),
    "topk": (TopKCrosscoder, TopKCrosscoderConfig),
    "relu, training": (TrainingCrosscoder, TrainingCrosscoderConfig),
    "topk, training": (TopKTrainingCrosscoder, TopKTrainingCrosscoderConfig),
}


def crosscoder(kind="relu", layers=L, width=WIDTH, d_sae=M, seed=0, metadata=None, **options):
    """A crosscoder with random weights, biases and rows of many norms."""
    torch.manual_seed(seed)
    cls, config = CLASSES[kind]
    if kind.startswith("topk"):
        options = {"k": K, **options}
    cfg = config(
        d_in=layers * width,
        d_sae=d_sae,
        n_routed_layers=layers,
        dtype="float64",
        metadata=metadata or SAEMetadata(),
        **options,
    )
    sae = cls(cfg)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
        sae.W_enc /= (layers * width) ** 0.5
        sae.W_dec *= torch.rand(d_sae, 1) / (layers * width) ** 0.5
        sae.b_enc /= 4
        sae.b_dec /= 10
    return sae


def streams(n=11, layers=L, width=WIDTH, seed=1):
    """Residual streams of layers that differ in scale and mean, as a model's do."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, layers, width, generator=generator, dtype=torch.float64)
    size = torch.tensor([3.0, 10.0, 40.0], dtype=torch.float64)[:layers, None]
    return x * size + size / 2


def explicit_normed(x):
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6)


def explicit_codes(sae, x):
    """Latents of streams [tokens, L, d], by a sum over layers of one encoder each."""
    layers, width = x.shape[-2:]
    normed = explicit_normed(x)
    if sae.cfg.apply_b_dec_to_input:
        normed = normed - sae.b_dec.view(layers, width)
    pre = torch.einsum("tld,ldm->tm", normed, sae.W_enc.view(layers, width, -1)) + sae.b_enc
    if not hasattr(sae.cfg, "k"):
        return pre.clamp(min=0)
    keep = pre.argsort(-1, descending=True).argsort(-1) < sae.cfg.k
    return torch.where(keep, pre, 0.0).clamp(min=0)


def explicit_decode(sae, codes, layers, width):
    W_dec = sae.W_dec.view(-1, layers, width)
    return torch.einsum("tm,mld->tld", codes, W_dec) + sae.b_dec.view(layers, width)


def training_output(sae, x, l1=0.01):
    return sae.training_forward_pass(
        TrainStepInput(
            sae_in=x,
            coefficients={"l1": l1} if "l1" in sae.get_coefficients() else {},
            dead_neuron_mask=torch.ones(sae.cfg.d_sae, dtype=torch.bool),
            n_training_steps=0,
            is_logging_step=False,
        )
    )


# --- the dictionary ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("pre_bias", [False, True])
def test_encode_and_decode_are_sums_over_layers(kind, pre_bias):
    sae, x = crosscoder(kind, apply_b_dec_to_input=pre_bias), streams()
    h, codes = sae.stack(x), explicit_codes(sae, x)
    assert 0 < (codes > 0).sum() < codes.numel()
    expected = explicit_decode(sae, codes, L, WIDTH)
    close(h, explicit_normed(x).reshape(len(x), -1), 1e-12)
    close(sae.encode(h), codes, 1e-12)
    close(sae.encode_layers(x), codes, 1e-12)
    close(sae(h), expected.reshape(len(x), -1), 1e-12)
    mean, scale = normalization_stats(x)
    close(
        sae.unstack(sae(h), mean, scale),
        expected * (x.std(-1, keepdim=True) + 1e-6) + x.mean(-1, keepdim=True),
        1e-12,
    )
    close(sae.unstack(h, mean, scale), x, 1e-12)
    close(sae.encode_layers(x.view(1, 11, 1, L, WIDTH)), codes.view(1, 11, 1, M), 1e-12)


def test_lindseys_crosscoder_takes_no_bias_off_its_input():
    for kind, expected in (("relu", False), ("topk", True)):
        assert crosscoder(kind).cfg.apply_b_dec_to_input is expected
        assert crosscoder(f"{kind}, training").cfg.apply_b_dec_to_input is expected


@pytest.mark.parametrize("kind", ["relu, training", "topk, training"])
def test_the_start(kind):
    cls, config = CLASSES[kind]
    sae = cls(
        config(d_in=L * WIDTH, d_sae=M, n_routed_layers=L, **({"k": K} if "k" in kind else {}))
    )
    close(sae.W_dec.norm(dim=-1), torch.ones(M), 1e-6)
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    close(sae.decoder_layer_norms().pow(2).sum(-1), torch.ones(M), 1e-6)
    assert not sae.b_enc.any() and not sae.b_dec.any()


# --- the loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["relu, training", "topk, training"])
def test_the_loss_is_the_mean_over_layers_of_norm_mse(kind):
    """Each layer's error over its own squared norm: to 1e-6, as the eps of the scale is 1e-6."""
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
    metadata = SAEMetadata(hook_name=NAME, hook_names=["a", "b", "c"])
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
    assert loaded.cfg.metadata.hook_names == ["a", "b", "c"]
    x = streams().float()
    assert torch.equal(loaded.encode_layers(x), sae.encode_layers(x))
    assert torch.equal(loaded(loaded.stack(x)), sae(sae.stack(x)))
    cfg = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    assert cfg["architecture"] == ("crosscoder_topk" if "topk" in kind else "crosscoder")

    sae.save_model(tmp_path / "checkpoint")  # what goes on training
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
        before, norms = sae(sae.stack(x)), sae.W_dec.norm(dim=-1)
        codes = sae.encode_layers(x)
        sae.fold_W_dec_norm()
        close(sae(sae.stack(x)), before, 1e-12)
        close(sae.encode_layers(x), codes * norms, 1e-12)
        close(sae.W_dec.norm(dim=-1), torch.ones(M, dtype=torch.float64), 1e-12)
    with pytest.raises(NotImplementedError, match="rescale_acts_by_decoder_norm"):
        crosscoder("topk").fold_W_dec_norm()


def test_saelens_knows_the_architectures():
    for architecture, kind in (("crosscoder", "relu"), ("crosscoder_topk", "topk")):
        for _ in range(2):
            assert get_sae_class(architecture) == CLASSES[kind]
            assert get_sae_training_class(architecture) == CLASSES[f"{kind}, training"]
            baselines.register(*CLASSES[f"{kind}, training"], *CLASSES[kind])  # autoreload


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
        crosscoder().stack(streams()[:, :2])
    with pytest.raises(ValueError, match=r"got \[11, 24\]"):
        crosscoder().encode_layers(streams().flatten(1))


# --- the splice ----------------------------------------------------------------------------------


def model_crosscoder(kind="relu", routed=ROUTED, width=D, seed=0):
    """A random crosscoder that changes a model."""
    metadata = SAEMetadata(
        hook_name=f"blocks.{routed[-1]}.hook_resid_stack",
        hook_names=[f"blocks.{b}.hook_resid_post" for b in routed],
    )
    sae = crosscoder(kind, len(routed), width, 4 * width, seed, metadata)
    with torch.no_grad():
        sae.W_dec.normal_().div_(4)
    return sae.requires_grad_(False)


def some_tokens(batch=3, length=11, seed=1):
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def brute_force(model, routed, f, run_model):
    """Logits with f in place of the stack: one pass to read, one to write."""
    blocks = decoder_blocks(model)
    _, clean = clean_streams(blocks, routed, run_model)
    mean = [x.mean(-1, keepdim=True) for x in clean]
    scale = [x.std(-1, keepdim=True) + 1e-6 for x in clean]
    normed = [(x - m) / s for x, m, s in zip(clean, mean, scale, strict=True)]
    value = torch.cat(normed, dim=-1)
    result = f(value)
    changed = (result != value).any(-1, keepdim=True)
    written = [
        part * s + m
        for part, s, m in zip(result.split(clean[0].shape[-1], -1), scale, mean, strict=True)
    ]

    def make_hook(index):
        def hook(module, args, output):
            if index not in routed:
                return None
            x = torch.where(changed, written[routed.index(index)], tensor(output))
            return (x, *output[1:]) if isinstance(output, tuple) else x

        return hook

    return with_hooks(blocks, make_hook, run_model), value


def shift(x):
    return x + torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype)


def some_positions(x):
    return torch.where(torch.arange(x.shape[1]).unsqueeze(-1) % 3 == 1, 2 * x + 0.5, x)


def one_layer_of_some_texts(x):
    changed = x.clone()
    changed[1:, 2:6, :D] += torch.linspace(-1, 1, D)  # later tokens attend to it
    return changed


EDITS = {
    "shift": shift,
    "zero": torch.zeros_like,
    "some positions": some_positions,
    "one layer of some texts": one_layer_of_some_texts,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edit", EDITS)
def test_edits_by_a_hook_function(make_model, kind, edit):  # noqa: F811
    model, sae, f, tokens = make_model(kind), model_crosscoder(), EDITS[edit], some_tokens()
    clean = run(model, tokens)
    expected, value = brute_force(model, ROUTED, f, lambda: run(model, tokens))
    assert (expected - clean).abs().max() > 0.1
    with attach(model, sae) as handle:
        hooks = [(NAME, hook_of(f))]
        close(model.run_with_hooks(tokens, fwd_hooks=hooks), expected)
        close(model.run_with_cache(tokens, names_filter=[NAME])[1][NAME], value, 1e-12)
        assert handle.routed_blocks == ROUTED
        assert torch.equal(run(model, tokens), clean)
    assert NAME not in model.hook_dict


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_edited_is_bit_identical_and_runs_once(make_model, kind):  # noqa: F811
    model, sae, tokens = make_model(kind), model_crosscoder(), some_tokens()
    clean, fired = run(model, tokens), []

    def copy(value, hook):
        return value.clone()

    def edit(value, hook):
        fired.append(value)
        return value + 1

    def calls_with(hook):
        return block_calls(model, lambda: model.run_with_hooks(tokens, fwd_hooks=[(NAME, hook)]))

    with attach(model, sae):
        assert torch.equal(run(model, tokens), clean)
        assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=[(NAME, copy)]), clean)
        assert calls_with(copy) == [1] * 8
        assert calls_with(edit) == [1, 1, 2, 2, 2, 1, 1, 1]
        assert len(fired) == 1


def test_clean_tokens_before_an_edit_keep_their_bits(make_model):  # noqa: F811
    model, sae, tokens = make_model("hooked-gpt2"), model_crosscoder(), some_tokens()
    clean = model(tokens)

    def edit(value, hook):
        return torch.cat([value[:, :6], value[:, 6:] + 1], 1)

    with attach(model, sae):
        edited = model.run_with_hooks(tokens, fwd_hooks=[(NAME, edit)])
    assert torch.equal(edited[:, :6], clean[:, :6])
    assert not torch.equal(edited[:, 6:], clean[:, 6:])


def test_earlier_edits_matter_through_tokens_that_were_left(make_model):  # noqa: F811
    """Where all tokens are edited, the last block's part alone decides; else all parts matter."""
    model, sae, tokens = make_model("hooked-llama"), model_crosscoder(), some_tokens()

    def edit(first_part, start):
        def hook(value, hook):
            value = value.clone()
            value[:, start:] += 0.5
            value[:, start:, :D] += first_part
            return value

        return model.run_with_hooks(tokens, fwd_hooks=[(NAME, hook)])

    with attach(model, sae):
        assert torch.equal(edit(0.0, 0), edit(1.0, 0))
        some, other = edit(0.0, 5), edit(1.0, 5)
        assert torch.equal(some, other)  # the clean tokens are all before them, and cannot attend

        def odd(value, hook, first_part):
            value = value.clone()
            value[:, 1::2, :D] += first_part
            return value

        one, two = (
            model.run_with_hooks(tokens, fwd_hooks=[(NAME, lambda v, hook, a=a: odd(v, hook, a))])
            for a in (1.0, 2.0)
        )
        close(one[:, :2], two[:, :2])
        assert (one[:, 2] - two[:, 2]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["relu", "topk"])
def test_a_crosscoder_added_to_the_model(kind):
    """SAELens's own ways at the hook: with and without the error term, leaving tokens out."""
    model, sae = hooked_model("llama", RouteSAETransformer), model_crosscoder(kind)
    tokens = some_tokens()
    clean, hook_dict = model(tokens), list(model.hook_dict)

    def reconstruct(value):
        return sae.decode(sae.encode(value))

    expected, value = brute_force(model, ROUTED, reconstruct, lambda: model(tokens))
    assert (expected - clean).abs().max() > 0.1
    close(model.run_with_saes(tokens, saes=[sae]), expected)
    close(model.run_with_saes(tokens, saes=[sae], use_error_term=True), clean)
    logits, cache = model.run_with_cache_with_saes(tokens, saes=[sae])
    close(logits, expected)
    close(cache[f"{NAME}.hook_sae_acts_post"], sae.encode(value))

    special = [int(tokens[0, 0]), int(tokens[1, 3])]
    left_out = torch.isin(tokens, torch.tensor(special)).unsqueeze(-1)

    def reconstruct_the_others(value):
        return torch.where(left_out, value, reconstruct(value))

    expected, _ = brute_force(model, ROUTED, reconstruct_the_others, lambda: model(tokens))
    close(model.run_with_saes(tokens, saes=[sae], exclude_special_tokens=special), expected)
    assert list(model.hook_dict) == hook_dict
    assert torch.equal(model(tokens), clean)


@pytest.mark.parametrize("kind", KINDS)
def test_cached_steps_with_edits_in_some(make_model, kind):  # noqa: F811
    model, sae, sizes, edited = make_model(kind), model_crosscoder(), [4, 3, 1, 1, 4, 1], [5, 8, 13]
    tokens, n_seen = some_tokens(3, sum(sizes)), 0
    mask = torch.ones_like(tokens)

    def edit(value):
        positions = torch.arange(value.shape[1]) + n_seen
        return torch.where(
            torch.isin(positions, torch.tensor(edited)).unsqueeze(-1), 2 * value + 1, value
        )

    expected, _ = brute_force(model, ROUTED, edit, lambda: run(model, tokens, mask))
    with attach(model, sae):
        model.hook_dict[NAME].add_hook(hook_of(edit))
        steps, logits = CachedSteps(model, 3), []
        for new in tokens.split(sizes, dim=1):
            logits.append(steps.step(new, mask, n_seen))
            n_seen += new.shape[1]
    close(torch.cat(logits, 1), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edit", [shift, some_positions])
def test_greedy_generation(make_model, kind, edit):  # noqa: F811
    """24 tokens: cached, uncached, and what brute force says comes next, all the same."""
    model, sae, n_prompt = make_model(kind), model_crosscoder(), 6
    prompts, n_seen = some_tokens(2, n_prompt), 0

    def at_position(value):  # a cached step sees the new token only
        start = n_seen if value.shape[1] == 1 else 0
        padding = value.new_zeros(value.shape[0], start, value.shape[2])
        return edit(torch.cat([padding, value], 1))[:, start:]

    def hook(value, hook):
        nonlocal n_seen
        result = at_position(value)
        n_seen = n_seen + 1 if value.shape[1] == 1 else value.shape[1]
        return result

    clean = greedy(model, prompts, cached=True, n=24)
    with attach(model, sae):
        assert torch.equal(greedy(model, prompts, cached=True, n=24), clean)
        model.hook_dict[NAME].add_hook(hook)
        cached = greedy(model, prompts, cached=True, n=24)
        assert torch.equal(greedy(model, prompts, cached=False, n=24), cached)
    assert not torch.equal(cached, clean)
    logits, _ = brute_force(model, ROUTED, edit, lambda: run(model, cached))
    assert torch.equal(logits.argmax(-1)[:, n_prompt - 1 : -1], cached[:, n_prompt:])


@pytest.mark.parametrize("left_out", [[], [0, 3]])
@torch.enable_grad()
def test_gradients_of_a_splice_against_central_differences(left_out):
    """Through the edit, the clean stack, its mean and scale, and the tokens that were left."""
    model = hooked_model("llama", n_layers=6, d=16).requires_grad_(False)
    sae, tokens = model_crosscoder(width=16), some_tokens(2, 5)
    generator = torch.Generator().manual_seed(0)
    readout = torch.randn(2, 5, VOCAB, generator=generator, dtype=torch.float64)
    residual = model(tokens, stop_at_layer=0)
    added = torch.zeros(2, 5, 48, dtype=torch.float64)
    is_left = torch.isin(torch.arange(5), torch.tensor(left_out)).unsqueeze(-1)

    def edit(value, added):
        return torch.where(is_left, value, value.tanh() + added)

    with attach(model, sae):

        def loss(residual, added):
            hooks = [(NAME, lambda value, hook: edit(value, added))]
            logits = model.run_with_hooks(residual, start_at_layer=0, fwd_hooks=hooks)
            return (logits * readout).sum()

        inputs = [residual.requires_grad_(), added.requires_grad_()]
        gradients = torch.autograd.grad(loss(*inputs), inputs)
        for i, gradient in enumerate(gradients):
            direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
            step = [torch.zeros_like(residual), torch.zeros_like(added)]
            step[i] = 1e-6 * direction
            with torch.no_grad():
                up = loss(residual + step[0], added + step[1])
                down = loss(residual - step[0], added - step[1])
            close((gradient * direction).sum(), (up - down) / 2e-6, 1e-6)


@torch.enable_grad()
def test_attribution_at_an_unchanged_hook(make_model):  # noqa: F811
    """A hook that changes nothing but carries a gradient: that of adding to every stream."""
    model, sae = make_model("hooked-llama").requires_grad_(False), model_crosscoder()
    tokens = some_tokens(2, 7)
    clean, streams_ = clean_streams(decoder_blocks(model), ROUTED, lambda: model(tokens))
    shift = torch.zeros(2, 7, len(ROUTED) * D, dtype=torch.float64, requires_grad=True)

    def make_hook(index):
        def hook(module, args, output):
            if index in ROUTED:
                i = ROUTED.index(index)
                scale = streams_[i].std(-1, keepdim=True) + 1e-6
                return output + shift[..., i * D : (i + 1) * D] * scale
            return None

        return hook

    added = with_hooks(decoder_blocks(model), make_hook, lambda: model(tokens))
    (expected,) = torch.autograd.grad(added[..., :5].sum(), shift)
    assert expected.view(2, 7, len(ROUTED), D).abs().sum(-1).min() > 0
    with attach(model, sae):
        hooks = [(NAME, hook_of(lambda value: value + shift))]
        logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
    assert torch.equal(logits, clean)
    close(torch.autograd.grad(logits[..., :5].sum(), shift)[0], expected)


def test_what_cannot_be_attached(make_model):  # noqa: F811
    model, sae = make_model("hooked-llama"), model_crosscoder()
    with pytest.raises(ValueError, match="unscaled=True"):
        attach(model, sae, unscaled=True)
    with pytest.raises(ValueError, match="n_routed_layers=3 and d_model=16"):
        attach(model, model_crosscoder(width=16))
    with attach(model, sae), pytest.raises(ValueError, match="has a Crosscoder attached already"):
        attach(model, route_sae([4, 5]))
    with (
        attach(model, route_sae([4, 5])),
        pytest.raises(ValueError, match="has a RouteTopKSAE attached already"),
    ):
        attach(model, sae)
    with attach(model, sae) as crosscoder_hook, attach(model, route_sae([5, 6])) as routed_hook:
        assert {crosscoder_hook.name, routed_hook.name} <= set(model.hook_dict)
    with attach(model, sae), pytest.raises(ValueError, match=r"returned \[3, 11, 1\]"):
        model.run_with_hooks(some_tokens(), fwd_hooks=[(NAME, hook_of(lambda x: x[..., :1]))])


@pytest.mark.parametrize("kind", ["relu", "topk"])
def test_run_evals_with_everything_on(kind):
    model, sae = hooked_model("llama", HookedSAETransformer), model_crosscoder(kind)
    for field, value in {"context_size": 12, "prepend_bos": True, "dataset_path": "none"}.items():
        sae.cfg.metadata[field] = value
    tokens = some_tokens(40, 12)
    tokens[:, 0] = 0
    store = ActivationsStore.from_sae(
        model,
        sae,
        dataset=Dataset.from_dict({"tokens": tokens.tolist()}),
        streaming=False,
        store_batch_size_prompts=4,
        n_batches_in_buffer=2,
        train_batch_size_tokens=12,
    )
    everything = get_eval_everything_config(
        batch_size_prompts=4,
        n_eval_reconstruction_batches=2,
        n_eval_sparsity_variance_batches=2,
    )
    with attach(model, sae):
        metrics, features = run_evals(
            sae, store, model, ActivationScaler(), everything, exclude_special_tokens=[0, 1]
        )
    numbers = {name: value for group in metrics.values() for name, value in group.items()}
    assert all(math.isfinite(value) for value in numbers.values())
    assert numbers["kl_div_with_sae"] > 0.01 and numbers["kl_div_with_ablation"] > 0.01
    # every n(x_i) has squared norm d - 1
    assert numbers["l2_norm_in"] == pytest.approx((len(ROUTED) * (D - 1)) ** 0.5, rel=1e-4)
    assert 0 < numbers["l0"] <= (K if kind == "topk" else sae.cfg.d_sae)
    assert len(features["feature_density"]) == sae.cfg.d_sae
