"""Sweeps: weights of separate runs, one forward pass for all, and what is written."""

import json
from dataclasses import replace

import psutil
import pytest
import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file
from support.small import TINYLLAMA
from support.sweep import (
    BLOCKS,
    FEW,
    PLAIN,
    ROUTED,
    STEP_TOKENS,
    STEPS,
    assert_same_bits,
    one_entry,
    sized_entries,
    sweep_settings,
)

from sae_lens_route.data.activations import RoutedActivationsStore
from sae_lens_route.errors import UserError
from sae_lens_route.saes.inference import to_inference
from sae_lens_route.saes.router import normalize
from sae_lens_route.training.runner import RouteSAETrainingRunner
from sae_lens_route.training.sweep import SweepRunner


@pytest.fixture(scope="module")
def entries():
    return sized_entries(ROUTED | PLAIN)


@pytest.fixture(scope="module")
def swept(tinyllama, entries, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep") / "out"
    return SweepRunner(sweep_settings(folder), entries, None, tinyllama).run(), folder


# --- the same as separate runs -------------------------------------------------------------------


@pytest.mark.parametrize("name", sized_entries(ROUTED))
def test_an_entry_is_bit_identical_to_a_separate_run(tinyllama, entries, swept, name):
    entry = entries[name]
    cfg = sweep_settings(routed_blocks=entry.blocks or BLOCKS, seed=entry.seed)
    cfg.sae = entry.sae
    separate = RouteSAETrainingRunner(cfg, None, tinyllama).run()
    assert_same_bits(to_inference(separate), swept[0][name])


def test_an_entry_with_a_learning_rate_is_bit_identical_to_a_run_with_it(tinyllama, tmp_path):
    entries = sized_entries({"own": {"k": 8, "lr": 0.004}, "shared": {"k": 8}})
    saes = SweepRunner(sweep_settings(tmp_path / "out"), entries, None, tinyllama).run()
    assert json.loads((tmp_path / "out" / "own" / "runner_cfg.json").read_text())["lr"] == 0.004
    assert not torch.equal(saes["own"].W_enc, saes["shared"].W_enc)
    for name, lr in (("own", {"lr": 0.004}), ("shared", {})):
        cfg = sweep_settings(seed=entries[name].seed, **lr)
        cfg.sae = entries[name].sae
        separate = RouteSAETrainingRunner(cfg, None, tinyllama).run()
        assert_same_bits(to_inference(separate), saes[name])


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_entry_is_bit_identical_to_saelens_trainer_on_normalized_streams(
    tinyllama, entries, swept, name
):
    entry = entries[name]
    cfg = sweep_settings(routed_blocks=entry.blocks)
    cfg.resolve(tinyllama)
    store = RoutedActivationsStore.from_config(tinyllama, cfg)
    batches = (normalize(batch.squeeze(1)) for batch in store)
    torch.manual_seed(entry.seed)
    sae = TrainingSAE.from_dict(entry.sae.to_dict())
    trained = SAETrainer(cfg.to_sae_trainer_config(), sae, batches).fit()
    for parameter, weight in to_inference(trained).state_dict().items():
        assert torch.equal(weight, swept[0][name].state_dict()[parameter]), parameter


def test_seeds_and_order_of_the_text_are_those_of_a_separate_run(tinyllama):
    """Two seeds of weights over one shuffled stream."""
    shuffled = {"activations_mixing_fraction": 0.5, "n_batches_in_buffer": 4}
    entries = sized_entries({"hard": {"k": 8}}, seeds=(3, 4))
    saes = SweepRunner(sweep_settings(**shuffled), entries, None, tinyllama).run()
    assert not torch.equal(*(sae.W_enc for sae in saes.values()))
    cfg = sweep_settings(**shuffled)
    untrained = SweepRunner(cfg, entries, None, tinyllama).saes["hard seed=4"]
    runner = RouteSAETrainingRunner(cfg, None, tinyllama, override_sae=untrained)
    assert_same_bits(to_inference(runner.run()), saes["hard seed=4"])


def test_the_language_model_runs_once_for_all(tinyllama):
    def blocks_run(entries):
        calls = []
        handle = tinyllama.blocks[3].register_forward_hook(lambda *_: calls.append(1))
        try:
            SweepRunner(sweep_settings(), entries, None, tinyllama).run()
        finally:
            handle.remove()
        return len(calls)

    # 64 tokens a pass too; special tokens are excluded, so one or two passes more than steps
    one, many = blocks_run(sized_entries({"one": {"k": 8}})), blocks_run(sized_entries(FEW))
    assert STEPS <= one <= STEPS + 2
    assert many == one


def test_prefetching_changes_nothing(tinyllama):
    entries = sized_entries({"hard": {"k": 8}, "plain": FEW["plain"]})
    plain = SweepRunner(sweep_settings(), entries, None, tinyllama).run()
    ahead = SweepRunner(sweep_settings(prefetch_llm_batches=3), entries, None, tinyllama).run()
    for name in entries:
        assert_same_bits(plain[name], ahead[name])


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (one_entry(blocks=[2, 3]), r"entry 'x': blocks=\[2, 3\] must .*\[3, 4, 5, 6, 7\]"),
        (one_entry(blocks=[5, 4]), r"entry 'x': blocks=\[5, 4\] must ascend"),
        (one_entry(blocks=[]), r"entry 'x': blocks=\[\] must"),
        (one_entry(architecture="topk"), r"entry 'x': 'topk' has no router .*blocks=\[7\]"),
        (
            one_entry(architecture="topk", blocks=[3, 4]),
            r"entry 'x': 'topk' .*blocks=\[4\], or take route_topk",
        ),
        (
            one_entry(routing="uniform", route_shares=[0.5, 0.5]),
            r"entry 'x': route_shares=\[0.5, 0.5\]: .* 5 ",
        ),
    ],
)
def test_blocks_that_do_not_fit_are_named_before_the_model_is_loaded(tmp_path, entry, message):
    with pytest.raises(UserError, match=message):
        SweepRunner(sweep_settings(tmp_path / "out", model_name="./nowhere"), {"x": entry})
    assert not (tmp_path / "out").exists()


def test_default_blocks_are_checked_once_the_model_is_loaded(tinyllama):
    with pytest.raises(UserError, match=r"entry 'x': blocks=\[2\] must .*\[3, 4, 5, 6, 7, 8, 9"):
        entries = {"x": one_entry(blocks=[2])}
        SweepRunner(sweep_settings(routed_blocks=None), entries, None, tinyllama)


def test_a_folder_of_another_sweep_is_not_overwritten(tinyllama, swept, tmp_path):
    cfg = sweep_settings(swept[1], model_name="./nowhere")
    with pytest.raises(UserError, match=r"hard k=4.: already holds a run .*give another folder"):
        SweepRunner(cfg, sized_entries(FEW))
    (tmp_path / "sweep.json").write_text("[]")
    with pytest.raises(UserError, match=r"already holds a run \(sweep\.json\)"):
        SweepRunner(sweep_settings(tmp_path), sized_entries(FEW), None, tinyllama)


def test_memory_is_checked_before_anything_is_made(tinyllama):
    huge = replace(one_entry(), sae=replace(one_entry().sae, d_sae=10**9))
    with pytest.raises(UserError, match=r"entries=2: would take [\d.]+ GB on cpu"):
        SweepRunner(sweep_settings(), {"x": huge, "y": huge}, None, tinyllama)
    wide = replace(one_entry(), sae=replace(one_entry().sae, d_sae=10**6))
    tokens = {"training_tokens": 10**9, "train_batch_size_tokens": 10**9}
    with pytest.raises(UserError, match=r"train_batch_size_tokens=1000000000: would take"):
        SweepRunner(sweep_settings(**tokens), {"x": wide}, None, tinyllama)


def test_the_estimate_adds_up_the_entries(tinyllama):
    entries = sized_entries({"x": {"k": [4, 8, 16]}})
    runner = SweepRunner(sweep_settings(), entries, None, tinyllama)
    (one, *_), estimate = runner.saes.values(), runner.memory_estimate()
    weights = sum(p.numel() * p.element_size() for p in one.parameters())
    assert estimate["saes"] == pytest.approx(3 * 4 * weights, rel=0.05)
    # latents and pre-activations of all three, gradients of one; float32
    assert estimate["features"] == pytest.approx(4 * 64 * (96 + 64) * (3 * 2 + 2))
    assert sum(estimate.values()) < psutil.virtual_memory().available


def test_a_loss_of_nan_names_the_entry(tinyllama):
    entries = sized_entries({"x": {"k": 8}})
    runner = SweepRunner(sweep_settings(lr=1e30), entries, None, tinyllama)
    with pytest.raises(UserError, match=r"entry 'x': the loss .* not finite .*without this entry"):
        runner.run()


# --- what is written -----------------------------------------------------------------------------


def test_entries_load_as_the_saes_that_run_returned(entries, swept):
    saes, folder = swept
    for name, entry in entries.items():
        loaded = SAE.load_from_disk(folder / name)
        assert type(loaded) is type(saes[name])
        assert_same_bits(loaded, saes[name])
        metadata, blocks = loaded.cfg.metadata, entry.blocks or BLOCKS
        kind = "stack" if name.startswith("crosscoder") else "route"
        assert metadata.routed_blocks == blocks
        assert metadata.hook_names == [f"blocks.{i}.hook_resid_post" for i in blocks]
        assert metadata.hook_name == f"blocks.{blocks[-1]}.{kind}.hook_resid_post"
        assert loaded.cfg.n_routed_layers == len(blocks)
        assert metadata.model_name == TINYLLAMA and metadata.exclude_special_tokens is True
        written = {path.name for path in (folder / name).iterdir()}
        assert written >= {"cfg.json", "sparsity.safetensors", "runner_cfg.json"}
        run = json.loads((folder / name / "runner_cfg.json").read_text())
        assert run["sae"]["architecture"] == entry.sae.architecture()
        assert run["routed_blocks"] == blocks and run["hook_name"] == metadata.hook_name
        objective = getattr(entry.sae, "router_objective", None)
        assert run["sae"].get("router_objective") == objective
    sparsity = load_file(folder / "plain topk" / "sparsity.safetensors")["sparsity"]
    assert (10**sparsity).sum() == pytest.approx(8, rel=1e-3)  # k of them per token


def test_the_log_has_every_entry(entries, swept):
    lines = (swept[1] / "train_log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert {record["name"] for record in records} == entries.keys()
    last = {r["name"]: r for r in records if r["tokens"] == STEP_TOKENS * STEPS}
    hard = last["hard k=4"]
    assert hard["step"] == STEPS and hard["l0"] == 4 and 0 < hard["loss"] < 1
    gap = {key: share for key, share in last["blocks with a gap"].items() if "share" in key}
    assert gap.keys() == {"route_share/block_4", "route_share/block_6"}
    assert sum(gap.values()) == pytest.approx(1)


def test_wandb_gets_a_run_of_its_own(tinyllama):
    """WANDB_MODE is disabled here: it is called as SAELens calls it, and nothing is sent."""
    from sae_lens import LoggingConfig

    cfg = sweep_settings(logger=LoggingConfig(log_to_wandb=True, wandb_log_frequency=2))
    saes = SweepRunner(cfg, sized_entries({"hard": {"k": 8}}), None, tinyllama).run()
    assert torch.isfinite(saes["hard"].W_enc).all()
