"""Checkpoints: whole, and a run resumes from one as if it had never stopped."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from sae_lens import LoggingConfig, TrainingSAE
from sae_lens.training._interruption import InterruptedException
from safetensors.torch import load_file
from support.killed import checkpoints_of, killed_at
from support.small import small_config
from support.sweep import (
    FEW,
    STEP_TOKENS,
    STEPS,
    assert_same_bits,
    one_entry,
    sized_entries,
    sweep_settings,
)

from sae_lens_route.errors import UserError
from sae_lens_route.training.checkpoint import newest_checkpoint, require_new_folder, require_whole
from sae_lens_route.training.runner import RouteSAETrainingRunner
from sae_lens_route.training.sweep import SweepRunner

LAST_FILE = "activations_store_state.safetensors"


def interrupted_at(runner, step):
    """SIGINT while the batch of a step is being made."""
    inner = runner.activations_store.get_data_loader()

    def loader():
        for n, batch in enumerate(inner):
            if n == step:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch

    runner.activations_store._dataloader = loader()
    with pytest.raises(InterruptedException):
        runner.run()


# --- one SAE -------------------------------------------------------------------------------------


def evaluating():
    return LoggingConfig(True, wandb_log_frequency=1, eval_every_n_wandb_logs=2)


SHUFFLED = {"activations_mixing_fraction": 0.5, "n_batches_in_buffer": 3}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefetch_llm_batches": 2},
        {"sae": {"routing": "uniform"}},
        {"sae": {"routing": "uniform"}, "prefetch_llm_batches": 2},
        {"sae": {"routing": "soft"}},
        {"sae": {"router_objective": "frozen"}},
        {"sae": {"router_objective": "assignment", "aggregation": "attention"}},
        {"train_batch_size_tokens": 37},
        {"autocast_lm": True},
        SHUFFLED,
        {**SHUFFLED, "prefetch_llm_batches": 2},
        {**SHUFFLED, "train_batch_size_tokens": 37, "activations_mixing_fraction": 0.8},
        {"on_bad_step": "skip"},
        {"logger": "W&B", "n_eval_batches": 1},
        {"logger": "W&B", "n_eval_batches": 1, "prefetch_llm_batches": 2},
        {"logger": "W&B", "n_eval_batches": 1, **SHUFFLED, "sae": {"routing": "uniform"}},
    ],
    ids=str,
)
def test_resuming_is_exact_from_every_checkpoint(tinyllama, tmp_path, options):
    """All bits of the weights, whatever makes the stream, and with W&B's evaluation in the run."""

    def run(folder, **more):
        logger = {"logger": evaluating()} if "logger" in options else {}
        fields = {**options, **logger, "n_checkpoints": 4, "training_tokens": 64 * 24, **more}
        return RouteSAETrainingRunner(small_config(folder, **fields), None, tinyllama).run()

    whole = run(tmp_path / "a")
    checkpoints = checkpoints_of(tmp_path / "a")
    assert len(checkpoints) == 4
    for checkpoint in checkpoints:
        rest = run(tmp_path / checkpoint.name, resume_from_checkpoint=str(checkpoint))
        assert_same_bits(whole, rest)


@pytest.mark.parametrize("options", [{}, {"prefetch_llm_batches": 2}, SHUFFLED], ids=str)
@pytest.mark.parametrize("routing", ["hard", "uniform"])
def test_evaluation_in_the_run_leaves_no_trace(tinyllama, options, routing):
    changes = {**options, "sae": {"routing": routing}, "n_eval_batches": 1}
    plain = RouteSAETrainingRunner(small_config(None, **changes), None, tinyllama).run()
    cfg = small_config(None, logger=evaluating(), **changes)
    assert_same_bits(plain, RouteSAETrainingRunner(cfg, None, tinyllama).run())
    assert cfg.hook_name not in tinyllama.hook_dict


def test_steps_and_checkpoints_continue_where_they_were(tinyllama, tmp_path):
    """Half way: steps are counted from the checkpoint, and no earlier checkpoint is written."""
    cfg = small_config(tmp_path / "a", n_checkpoints=3)
    RouteSAETrainingRunner(cfg, None, tinyllama).run()
    whole = checkpoints_of(tmp_path / "a")
    cfg = small_config(tmp_path / "b", n_checkpoints=3, resume_from_checkpoint=str(whole[1]))
    RouteSAETrainingRunner(cfg, None, tinyllama).run()
    rest = checkpoints_of(tmp_path / "b")
    assert [path.name for path in rest] == [path.name for path in whole[2:]]
    for ours, theirs in zip(rest, whole[2:], strict=True):
        names = {path.name for path in ours.iterdir()}
        assert names == {path.name for path in theirs.iterdir()}
        assert not {name for name in names if name.endswith((".pt", ".pkl", ".bin"))}
        for name in names - {"runner_cfg.json"}:
            if name.endswith(".json"):
                assert (ours / name).read_text() == (theirs / name).read_text(), name
            else:
                tensors, others = load_file(ours / name), load_file(theirs / name)
                assert tensors.keys() == others.keys() and tensors
                assert all(torch.equal(tensors[key], others[key]) for key in tensors), name


def test_an_interrupted_run_leaves_a_whole_checkpoint_and_resumes_exactly(tinyllama, tmp_path):
    whole = RouteSAETrainingRunner(small_config(None), None, tinyllama).run()
    interrupted_at(RouteSAETrainingRunner(small_config(tmp_path), None, tinyllama), 5)
    (checkpoint,) = checkpoints_of(tmp_path)
    assert not (tmp_path / "cfg.json").exists()
    cfg = small_config(tmp_path, resume_from_checkpoint=str(checkpoint))
    assert_same_bits(whole, RouteSAETrainingRunner(cfg, None, tinyllama).run())


def test_a_checkpoint_is_a_training_sae(tinyllama, tmp_path):
    cfg = small_config(tmp_path, n_checkpoints=1)
    RouteSAETrainingRunner(cfg, None, tinyllama).run()
    (checkpoint,) = checkpoints_of(tmp_path)
    assert type(TrainingSAE.load_from_disk(checkpoint)).__name__ == "RouteTopKTrainingSAE"
    assert load_file(checkpoint / "sae_weights.safetensors").keys() >= {"W_router"}
    saved = json.loads((checkpoint / "runner_cfg.json").read_text())
    assert saved["routed_blocks"] == list(range(3, 12))


@pytest.mark.parametrize("prefetch", [False, 2])
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(
    tinyllama, tmp_path, prefetch
):
    options = {**SHUFFLED, "n_checkpoints": 8, "prefetch_llm_batches": prefetch}
    whole = RouteSAETrainingRunner(small_config(None, **options), None, tinyllama).run()
    code = (
        "from support.small import small_config\n"
        f"cfg = small_config(folder, resume_from_checkpoint=resume, **{options!r})\n"
        "module.RouteSAETrainingRunner(cfg).run()"
    )
    killed_at(code, tmp_path / "a", 5, 4)
    cfg = small_config(
        tmp_path / "a", resume_from_checkpoint=str(tmp_path / "a"), **options, keep_checkpoints=1
    )
    assert_same_bits(whole, RouteSAETrainingRunner(cfg, None, tinyllama).run())
    log = [json.loads(line) for line in (tmp_path / "a" / "train_log.jsonl").open()]
    assert [record["step"] for record in log] == sorted({record["step"] for record in log})


def test_a_checkpoint_without_its_last_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no whole checkpoint; take the folder of a run"):
        cfg = small_config(None, model_name="./nowhere", resume_from_checkpoint=str(tmp_path))
        RouteSAETrainingRunner(cfg)
    (tmp_path / LAST_FILE).touch()
    (tmp_path / "run_state.json").touch()
    assert require_whole(tmp_path) == tmp_path


def test_a_folder_with_a_run_is_refused(tmp_path):
    require_new_folder(tmp_path)
    (tmp_path / "cfg.json").touch()
    with pytest.raises(UserError, match=r"already holds a run .*give another folder or remove it"):
        require_new_folder(tmp_path)


# --- sweeps --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_sweep(tinyllama):
    return SweepRunner(sweep_settings(), sized_entries(FEW), None, tinyllama).run()


@pytest.mark.parametrize("prefetch", [False, 2])
def test_an_interrupted_sweep_resumes_exactly(tinyllama, whole_sweep, tmp_path, prefetch):
    options = {"prefetch_llm_batches": prefetch}
    entries = sized_entries(FEW)
    interrupted_at(SweepRunner(sweep_settings(tmp_path, **options), entries, None, tinyllama), 5)
    (checkpoint,) = checkpoints_of(tmp_path)
    assert int(checkpoint.name) < STEP_TOKENS * STEPS
    assert not (tmp_path / "uniform").exists()
    cfg = sweep_settings(tmp_path, resume_from_checkpoint=str(checkpoint), **options)
    rest = SweepRunner(cfg, entries, None, tinyllama).run()
    for name in whole_sweep:
        assert_same_bits(whole_sweep[name], rest[name])
    log = [json.loads(line) for line in (tmp_path / "train_log.jsonl").read_text().splitlines()]
    last = [line for line in log if line["name"] == "plain"][-1]
    assert (last["tokens"], last["step"]) == (STEP_TOKENS * STEPS, STEPS)


def test_a_sweep_resumes_exactly_from_any_checkpoint(tinyllama, whole_sweep, tmp_path):
    entries = sized_entries(FEW)
    SweepRunner(sweep_settings(tmp_path / "a", n_checkpoints=2), entries, None, tinyllama).run()
    first, _ = checkpoints_of(tmp_path / "a")
    cfg = sweep_settings(tmp_path / "b", resume_from_checkpoint=str(first))
    rest = SweepRunner(cfg, entries, None, tinyllama).run()
    for name in whole_sweep:
        assert_same_bits(whole_sweep[name], rest[name])


def test_an_entry_can_be_left_out_on_resuming(tinyllama, whole_sweep, tmp_path):
    """What goes wrong with one of them (its loss is NaN, say) need not cost the others."""
    entries = sized_entries(FEW)
    SweepRunner(sweep_settings(tmp_path / "a", n_checkpoints=1), entries, None, tinyllama).run()
    (checkpoint,) = checkpoints_of(tmp_path / "a")
    kept = {name: entry for name, entry in entries.items() if name in ("plain", "uniform")}
    cfg = sweep_settings(tmp_path / "b", resume_from_checkpoint=str(checkpoint))
    rest = SweepRunner(cfg, kept, None, tinyllama).run()
    for name in kept:
        assert_same_bits(whole_sweep[name], rest[name])


def test_a_killed_sweep_resumes_exactly(tinyllama, whole_sweep, tmp_path):
    code = (
        "from support.sweep import *\n"
        "from sae_lens_route.training.sweep import SweepRunner\n"
        "cfg = sweep_settings(folder, n_checkpoints=4, resume_from_checkpoint=resume)\n"
        "SweepRunner(cfg, sized_entries(FEW)).run()"
    )
    killed_at(code, tmp_path / "a", 6)
    cfg = sweep_settings(tmp_path / "a", resume_from_checkpoint=str(tmp_path / "a"))
    rest = SweepRunner(cfg, sized_entries(FEW), None, tinyllama).run()
    for name in whole_sweep:
        assert_same_bits(whole_sweep[name], rest[name])


def test_a_checkpoint_of_other_entries_is_refused(tinyllama, tmp_path):
    entries = {"x": one_entry()}
    SweepRunner(sweep_settings(tmp_path / "a", n_checkpoints=1), entries, None, tinyllama).run()
    (checkpoint,) = checkpoints_of(tmp_path / "a")
    cfg = sweep_settings(model_name="./nowhere", resume_from_checkpoint=str(checkpoint))
    for changed, message in [
        ({"y": one_entry()}, "holds no entry 'y'; it has x"),
        ({"x": one_entry(k=4)}, "entry 'x' has k=8 there, not 4"),
        ({"x": one_entry(blocks=[3, 4, 5])}, r"blocks=\[3, 4, 5, 6, 7\] there, not \[3, 4, 5\]"),
        ({"x": one_entry(architecture="crosscoder_topk")}, "architecture='route_topk' there"),
        ({"x": replace(one_entry(), seed=1)}, "entry 'x' has seed=0 there, not 1"),
        ({"x": replace(one_entry(), lr=0.5)}, "entry 'x' has lr=0.0005 there, not 0.5"),
    ]:
        with pytest.raises(UserError, match=message):
            SweepRunner(cfg, changed)
    (checkpoint / LAST_FILE).unlink()
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        SweepRunner(cfg, entries)


def test_the_newest_checkpoint_of_a_run_is_found(tinyllama, tmp_path):
    cfg = small_config(tmp_path / "run", n_checkpoints=4, keep_checkpoints=2)
    RouteSAETrainingRunner(cfg, None, tinyllama).run()
    kept = checkpoints_of(tmp_path / "run")
    assert len(kept) == 2
    for folder in (tmp_path / "run", kept[0].parent, kept[1]):
        assert newest_checkpoint(folder).resolve() == kept[1]
    pointer = tmp_path / "run" / "latest"
    assert (pointer.parent / pointer.read_text()).resolve() == kept[1]
    for content in ("", "nowhere", "\x00"):
        pointer.write_text(content.replace("\x00", "../.."))
        assert newest_checkpoint(tmp_path / "run") == kept[1]
    pointer.unlink()
    assert newest_checkpoint(tmp_path / "run") == kept[1]
    (kept[1] / LAST_FILE).unlink()
    assert newest_checkpoint(tmp_path / "run") == kept[0]
    assert newest_checkpoint(tmp_path) is None
