"""Steps that are not finite, a collapsed router and dead features do not pass in silence."""

import json
import re

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE, LoggingConfig, TrainingSAE
from safetensors.torch import load_file
from support.small import TINYLLAMA, TINYLLAMA_WIDTH, small_config, tokens_dataset
from support.sweep import assert_same_bits, sized_entries, sweep_settings

from sae_lens_route.config import trainable_architectures, training_config
from sae_lens_route.errors import UserError
from sae_lens_route.models.load import load_model
from sae_lens_route.training.checkpoint import newest_checkpoint, run_state
from sae_lens_route.training.runner import RouteSAETrainingRunner
from sae_lens_route.training.sweep import SweepRunner
from sae_lens_route.training.trainer import CheckedTrainer

STEP, BAD_TOKEN, BAD_STEP = 64, 511, 8


@pytest.fixture(scope="module")
def broken_model():
    """Its streams are NaN in every context that holds one token."""
    model = load_model(TINYLLAMA)
    with torch.no_grad():
        model.embed.W_E[BAD_TOKEN] = float("nan")
    return model


@pytest.fixture(scope="module")
def text():
    """Contexts of which the one of step 8 (four a step, none excluded) holds that token."""
    tokens = torch.tensor(tokens_dataset(64)["tokens"])
    tokens[tokens == BAD_TOKEN] = 2
    tokens[4 * (BAD_STEP - 1) + 2, 5] = BAD_TOKEN
    return Dataset.from_dict({"tokens": tokens.tolist()})


def config(folder, every=1000, **changes):
    fields = {"training_tokens": 14 * STEP, "exclude_special_tokens": False, **changes}
    return small_config(folder, logger=LoggingConfig(False, wandb_log_frequency=every), **fields)


def finite(folder):
    tensors = load_file(folder / "sae_weights.safetensors").values()
    return all(torch.isfinite(tensor).all() for tensor in tensors)


@pytest.mark.parametrize("every", [1, 3, 1000])
@pytest.mark.parametrize("n_checkpoints", [1, 6, 13])
def test_no_checkpoint_holds_nan_and_the_step_is_named(
    broken_model, text, tmp_path, n_checkpoints, every
):
    """However seldom numbers are read. The batch is saved, the checkpoint before is the last."""
    cfg = config(tmp_path / "run", every, n_checkpoints=n_checkpoints)
    expected = rf"not finite after step {BAD_STEP}; its batch is in .*bad_step_8\.safetensors"
    with pytest.raises(UserError, match=expected):
        RouteSAETrainingRunner(cfg, text, broken_model).run()
    checkpoints = list((tmp_path / "run" / "checkpoints").glob("*/*"))
    assert all(finite(path) for path in checkpoints)
    assert all(int(path.name) < BAD_STEP * STEP for path in checkpoints)
    assert bool(checkpoints) == (n_checkpoints > 1)
    batch = load_file(tmp_path / "run" / f"bad_step_{BAD_STEP}.safetensors")["activations"]
    contexts = torch.stack([torch.as_tensor(row) for row in text["tokens"]])
    contexts = contexts[4 * (BAD_STEP - 1) : 4 * BAD_STEP]
    _, cache = broken_model.run_with_cache(contexts)
    streams = torch.stack([cache[f"blocks.{i}.hook_resid_post"] for i in range(3, 12)], dim=2)
    torch.testing.assert_close(batch, streams.flatten(0, 1), equal_nan=True)
    assert batch.isnan().any()


@pytest.mark.parametrize("prefetch", [False, 2])
def test_a_bad_step_is_skipped_counted_and_logged(
    broken_model, text, tmp_path, caplog, prefetch, tinyllama
):
    cfg = config(
        tmp_path / "run", 1, n_checkpoints=13, on_bad_step="skip", prefetch_llm_batches=prefetch
    )
    RouteSAETrainingRunner(cfg, text, broken_model).run()
    assert finite(tmp_path / "run")
    assert all(finite(path) for path in (tmp_path / "run" / "checkpoints").glob("*/*"))
    lines = (tmp_path / "run" / "train_log.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in lines]
    assert [record["bad_steps"] for record in records] == [0] * 7 + [1] * 7
    assert [record["loss"] is None for record in records] == [i == 7 for i in range(14)]
    assert f"step {BAD_STEP} is not finite and was skipped; its batch is in" in caplog.text
    weights = {int(path.name): load_file(path / "sae_weights.safetensors")["W_enc"] for path in
               (tmp_path / "run" / "checkpoints").glob("*/*")}  # fmt: skip
    assert torch.equal(weights[7 * STEP], weights[8 * STEP])
    assert not torch.equal(weights[8 * STEP], weights[9 * STEP])


def test_skipping_changes_nothing_where_no_step_is_bad(tinyllama, tmp_path):
    plain = RouteSAETrainingRunner(small_config(None), None, tinyllama).run()
    cfg = small_config(None, on_bad_step="skip")
    assert_same_bits(plain, RouteSAETrainingRunner(cfg, None, tinyllama).run())


@pytest.mark.parametrize("bad_at", [0, 2])
@pytest.mark.parametrize("architecture", trainable_architectures())
def test_a_skipped_step_leaves_the_whole_trainer_as_it_was(architecture, bad_at):
    """Weights, thresholds, Adam's moments and firing counts, in the first step too."""
    cfg = small_config(None, routed_blocks=[2, 5, 9])
    cfg.sae = training_config(architecture, {"d_in": TINYLLAMA_WIDTH, "d_sae": 96})
    cfg.resolve(load_model(TINYLLAMA))
    torch.manual_seed(0)
    sae = TrainingSAE.from_dict(cfg.sae.to_dict())
    trainer = CheckedTrainer(cfg.to_sae_trainer_config(), sae, iter(()), skips_bad_steps=True)
    sae.cfg.metadata.routed_blocks = [2, 5, 9]
    generator = torch.Generator().manual_seed(1)

    def batch():
        return torch.randn(64, 3, TINYLLAMA_WIDTH, generator=generator)

    def take(x):
        trainer.step(x)
        trainer.n_training_steps += 1

    def everything():
        moments = {
            f"{name}.{key}": trainer.optimizer.state[parameter][key].clone()
            for name, parameter in sae.named_parameters()
            for key in ("exp_avg", "exp_avg_sq")
            if parameter in trainer.optimizer.state
        }
        counts = {n: getattr(trainer, n).clone() for n in ("act_freq_scores",
                  "n_forward_passes_since_fired")}  # fmt: skip
        return {**{k: v.clone() for k, v in sae.state_dict().items()}, **moments, **counts}

    for _ in range(bad_at):
        take(batch())
    before = everything()
    x = batch()
    x[3, 1, 5] = float("nan") if bad_at else float("inf")
    take(x)
    after = everything()
    for name, value in after.items():
        assert torch.equal(value, before.get(name, torch.zeros_like(value))), name
    assert (trainer.bad_steps.first(), trainer.bad_steps.count()) == (bad_at + 1, 1)
    take(batch())
    take(batch())
    assert trainer.bad_steps.count() == 1
    assert not torch.equal(sae.W_dec, after["W_dec"])
    assert all(torch.isfinite(value).all() for value in everything().values())


def test_a_sweep_names_the_entry(broken_model, text, tmp_path):
    entries = sized_entries({"x": {"k": 8}, "y": {"k": 4}})
    cfg = sweep_settings(
        tmp_path, n_checkpoints=5, exclude_special_tokens=False, training_tokens=14 * STEP
    )
    with pytest.raises(UserError, match=r"entry 'x': .* step 8; .*a sweep without this entry"):
        SweepRunner(cfg, entries, text, broken_model).run()
    assert 0 < run_state(newest_checkpoint(tmp_path))["n_training_samples"] < BAD_STEP * STEP


def test_a_run_resumes_after_a_bad_step_where_the_text_is_repaired(
    broken_model, tinyllama, text, tmp_path
):
    cfg = config(tmp_path, n_checkpoints=6)
    with pytest.raises(UserError, match="step 8"):
        RouteSAETrainingRunner(cfg, text, broken_model).run()
    cfg = config(tmp_path, n_checkpoints=6, resume_from_checkpoint=str(tmp_path))
    rest = RouteSAETrainingRunner(cfg, text, tinyllama).run()
    whole = RouteSAETrainingRunner(config(None), text, tinyllama).run()
    assert_same_bits(whole, rest)


# --- warnings ------------------------------------------------------------------------------------


def test_a_collapsed_router_is_reported_once_with_numbers(tinyllama, tmp_path, caplog):
    cfg = config(None, 1, training_tokens=30 * STEP, sae={"router_objective": "frozen"})
    runner = RouteSAETrainingRunner(cfg, None, tinyllama)
    x = next(runner.activations_store.from_the_start())
    normalized = (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)
    with torch.no_grad():  # every token's summed streams are close to their mean
        runner.sae.W_router.zero_()
        runner.sae.W_router[:, 4] = normalized.sum(1).mean(0)
    runner.run()
    warnings = [r.message for r in caplog.records if "router collapsed" in r.message]
    assert len(warnings) == 1
    assert re.search(r"block 7 received (9\d|100)% of the tokens of 10 records \(steps 1 to 10\)",
                     warnings[0])  # fmt: skip
    assert "router_objective='assignment' balances the blocks" in warnings[0]


@pytest.mark.parametrize(("window", "n_warnings"), [(2, 1), (1000, 0)])
def test_dead_features_are_reported_once_with_numbers(tinyllama, caplog, window, n_warnings):
    cfg = config(None, 1, sae={"d_sae": 2048, "k": 2}, dead_feature_window=window)
    RouteSAETrainingRunner(cfg, None, tinyllama).run()
    warnings = [r.message for r in caplog.records if "have not fired" in r.message]
    assert len(warnings) == n_warnings
    if warnings:
        found = re.search(r"([\d,]+) of 2,048 features \((\d+)%\) .*window=2 steps", warnings[0])
        n_dead = int(found[1].replace(",", ""))
        assert n_dead > 1024 and round(100 * n_dead / 2048) == int(found[2])


def test_nothing_is_reported_of_a_healthy_or_uniform_run(tinyllama, caplog):
    for sae in ({}, {"routing": "uniform"}):
        RouteSAETrainingRunner(config(None, 1, sae=sae), None, tinyllama).run()
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_a_loaded_sae_of_a_skipping_run_is_usable(broken_model, text, tmp_path):
    RouteSAETrainingRunner(config(tmp_path, on_bad_step="skip"), text, broken_model).run()
    assert torch.isfinite(SAE.load_from_disk(tmp_path).W_dec).all()
