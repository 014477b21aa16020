"""Resuming is refused for another run; a run can be extended; every early end says how to go on."""

import errno
import json
import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE
from sae_lens.training._interruption import InterruptedException
from support.small import TINYLLAMA, small_config, tokens_dataset
from support.sweep import assert_same_bits, sized_entries, sweep_settings

from sae_lens_route.config import training_config
from sae_lens_route.errors import UserError
from sae_lens_route.files import locked
from sae_lens_route.training.checkpoint import is_whole, newest_checkpoint, run_state
from sae_lens_route.training.resume import MAY_CHANGE, resumed_config
from sae_lens_route.training.runner import RouteSAETrainingRunner
from sae_lens_route.training.sweep import SweepRunner

STEP = 64


@pytest.fixture(scope="module")
def finished(tinyllama, tmp_path_factory):
    """A run of twelve steps with checkpoints after 4, 7 and 10."""
    folder = tmp_path_factory.mktemp("run") / "a"
    RouteSAETrainingRunner(small_config(folder, n_checkpoints=3), None, tinyllama).run()
    return folder


@pytest.fixture
def interrupted(finished, tmp_path):
    """The same without its end."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for name in ("cfg.json", "sae_weights.safetensors", "runner_cfg.json", "sparsity.safetensors"):
        (folder / name).unlink()
    return folder


def records(folder):
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]


def stop_at(runner, step, action):
    """Call `action` while the batch of a step is being made."""
    inner = runner.activations_store.get_data_loader()

    def loader():
        for n, batch in enumerate(inner):
            if n == step:
                action()
            yield batch

    runner.activations_store._dataloader = loader()


def fail(error):
    def action():
        raise error

    return action


# --- another run ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"sae": {"k": 4}}, "sae.k=8, not 4"),
        ({"sae": {"d_sae": 64}}, "sae.d_sae=128, not 64"),
        ({"sae": {"routing": "uniform"}}, "sae.routing='hard', not 'uniform'"),
        ({"sae": {"aggregation": "mean"}}, "sae.aggregation='sum', not 'mean'"),
        ({"sae": {"router_objective": "frozen"}}, "sae.router_objective='reconstruction'"),
        ({"sae": {"loss": "mse"}}, "sae.loss='normalized_mse', not 'mse'"),
        ({"sae": {"decoder_norm_interval": 5}}, "sae.decoder_norm_interval=10, not 5"),
        ({"sae": {"dtype": "float64"}}, "sae.dtype='float32', not 'float64'"),
        ({"routed_blocks": [3, 4]}, r"routed_blocks=[3, 4, 5, 6, 7, 8, 9, 10, 11], not [3, 4]"),
        ({"dataset_path": "demo:heldout"}, "dataset_path='demo', not 'demo:heldout'"),
        ({"model_name": "demo"}, "not 'demo'"),
        ({"dtype": "float64"}, "dtype='float32', not 'float64'"),
        ({"activations_mixing_fraction": 0.5}, "activations_mixing_fraction=0.0, not 0.5"),
        ({"lr": 1e-4}, "lr=0.0005, not 0.0001"),
        ({"lr_warm_up_steps": 3}, "lr_warm_up_steps=0, not 3"),
        ({"lr_decay_steps": 3}, "lr_decay_steps=2, not 3"),
        ({"lr_scheduler_name": "cosineannealing"}, "lr_scheduler_name='constant'"),
        ({"adam_beta1": 0.5}, "adam_beta1=0.9, not 0.5"),
        ({"seed": 1}, "seed=42, not 1"),
        ({"context_size": 32}, "context_size=16, not 32"),
        ({"store_batch_size_prompts": 2}, "store_batch_size_prompts=4, not 2"),
        ({"train_batch_size_tokens": 32}, "train_batch_size_tokens=64, not 32"),
        ({"exclude_special_tokens": False}, "exclude_special_tokens=True, not False"),
        ({"seqpos_slice": (2,)}, "seqpos_slice=[None], not [2]"),
        ({"autocast_lm": True}, "autocast_lm=False, not True"),
        ({"training_tokens": STEP * 30}, "training_tokens=768, not 1920"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_another_run_is_refused_by_name_with_both_values(interrupted, changes, field):
    """Before a model is loaded: there is none at the path that the message may name first."""
    cfg = small_config(interrupted, resume_from_checkpoint=str(interrupted), **changes)
    with pytest.raises(UserError, match="the run there has ") as caught:
        RouteSAETrainingRunner(cfg)
    assert field in str(caught.value)
    if "training_tokens" in changes:
        assert "--extend" in str(caught.value)


def test_another_architecture_or_text_is_refused(interrupted, tinyllama):
    cfg = small_config(interrupted, resume_from_checkpoint=str(interrupted))
    other = training_config("route_batchtopk", {"d_in": 64, "d_sae": 128, "k": 8})
    cfg.sae = other
    with pytest.raises(UserError, match=r"sae\.architecture='route_topk', not 'route_batchtopk'"):
        RouteSAETrainingRunner(cfg, None, tinyllama)
    cfg = small_config(interrupted, resume_from_checkpoint=str(interrupted))
    with pytest.raises(UserError, match="the first contexts of the data set"):
        RouteSAETrainingRunner(cfg, tokens_dataset(), tinyllama).run()


def test_what_may_change_does_not_change_the_result(tinyllama, finished, interrupted):
    changes = {"n_checkpoints": 0, "verbose": True, "n_eval_batches": 3, "streaming": False}
    changes |= {"on_bad_step": "skip", "prefetch_llm_batches": 1, "keep_checkpoints": 1}
    assert changes.keys() <= MAY_CHANGE
    cfg = small_config(interrupted, resume_from_checkpoint=str(interrupted), **changes)
    RouteSAETrainingRunner(cfg, None, tinyllama).run()
    assert_same_bits(SAE.load_from_disk(finished), SAE.load_from_disk(interrupted))


def test_a_sweeps_settings_are_compared_too(tinyllama, tmp_path):
    entries = sized_entries({"x": {"k": 8}})
    SweepRunner(sweep_settings(tmp_path, n_checkpoints=1), entries, None, tinyllama).run()
    cfg = sweep_settings(None, resume_from_checkpoint=str(tmp_path), lr=1e-4)
    with pytest.raises(UserError, match=r"lr=0\.0005 there, not 0\.0001"):
        SweepRunner(cfg, entries, None, tinyllama)


def test_the_stored_configuration_resumes_the_run(finished, interrupted):
    """From the folder alone, wherever it was moved."""
    cfg = resumed_config(interrupted, {})
    assert cfg.output_path == str(interrupted)
    RouteSAETrainingRunner(cfg).run()
    assert_same_bits(SAE.load_from_disk(finished), SAE.load_from_disk(interrupted))
    with pytest.raises(UserError, match=r"lr=0\.0005, not 0\.1"):
        RouteSAETrainingRunner(resumed_config(finished, {"lr": "0.1", "output_path": "null"}))
    with pytest.raises(UserError, match="its run is finished; extend_run"):
        RouteSAETrainingRunner(resumed_config(finished, {}))
    with pytest.raises(UserError, match="kk='3': a run resumes with the fields it began with"):
        resumed_config(finished, {"kk": "3"})


def test_a_checkpoint_resumes_its_run_wherever_that_is_seen_from(tinyllama, tmp_path, monkeypatch):
    """The output folder was relative to another working folder, or the run was moved."""
    monkeypatch.chdir(tmp_path)
    cfg = small_config(Path("runs") / "a", n_checkpoints=1)
    RouteSAETrainingRunner(cfg, None, tinyllama).run()
    checkpoint = newest_checkpoint(Path("runs") / "a")
    assert checkpoint is not None
    assert resumed_config(checkpoint, {}).output_path == "runs/a"
    assert resumed_config(Path("runs") / "a", {}).output_path == "runs/a"
    assert resumed_config(checkpoint, {"output_path": "b"}).output_path == "b"
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    whole = str(tmp_path / "runs" / "a")
    assert resumed_config(tmp_path / checkpoint, {}).output_path == whole
    assert resumed_config(Path("..") / checkpoint, {}).output_path == "../runs/a"
    shutil.copytree(whole, tmp_path / "moved")
    moved = newest_checkpoint(tmp_path / "moved")
    assert moved is not None
    assert resumed_config(moved, {}).output_path == str(tmp_path / "moved")
    alone = shutil.copytree(moved, tmp_path / "x" / "y" / "z")
    assert resumed_config(alone, {}).output_path == "runs/a"  # there is no run around it


# --- a longer run --------------------------------------------------------------------------------


def test_an_extended_run_keeps_the_rate_and_decays_at_its_new_end(tinyllama, finished, tmp_path):
    """From the newest checkpoint, at 10 of 12 steps: constant to step 26, then to 0 at step 30."""
    folder = tmp_path / "longer"
    shutil.copytree(finished, folder)
    cfg = resumed_config(folder, {"wandb_log_frequency": "1"}, extend_to=30 * STEP)
    before = SAE.load_from_disk(folder).W_dec.clone()
    RouteSAETrainingRunner(cfg, None, tinyllama).run()
    assert not torch.equal(before, SAE.load_from_disk(folder).W_dec)
    rates = {r["step"]: r["current_learning_rate"] for r in records(folder)}
    assert [step for step in rates if step > 10] == list(range(11, 31))
    for step in range(11, 31):  # the rate logged at a step is that of the next one
        expected = 5e-4 * min(1, (30 - step) / 4)
        assert rates[step] == pytest.approx(expected, rel=1e-6, abs=1e-12), step


def test_an_extended_run_resumes_exactly_and_only_as_such(tinyllama, finished, tmp_path):
    def longer(name, **changes):
        fields = {"training_tokens": 30 * STEP, "n_checkpoints": 5, **changes}
        return small_config(tmp_path / name, **fields)

    start = str(newest_checkpoint(finished))
    cfg = longer("a", resume_from_checkpoint=start, extend_run=True)
    whole = RouteSAETrainingRunner(cfg, None, tinyllama).run()
    checkpoints = sorted((tmp_path / "a" / "checkpoints").glob("*/*"), key=lambda p: int(p.name))
    assert checkpoints
    for i, checkpoint in enumerate(checkpoints):
        cfg = longer(f"b{i}", resume_from_checkpoint=str(checkpoint))
        assert_same_bits(whole, RouteSAETrainingRunner(cfg, None, tinyllama).run())
    cfg = longer("c", resume_from_checkpoint=str(checkpoints[0]), training_tokens=40 * STEP)
    with pytest.raises(UserError, match="training_tokens=1920, not 2560"):
        RouteSAETrainingRunner(cfg)
    cfg = longer("c", resume_from_checkpoint=start, extend_run=True, training_tokens=10 * STEP)
    with pytest.raises(UserError, match=r"has 640 tokens already; .* at least 704"):
        RouteSAETrainingRunner(cfg)
    with pytest.raises(UserError, match="extend_run=True: name the run"):
        RouteSAETrainingRunner(longer("c", extend_run=True))


# --- early ends ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_and_a_hint(tinyllama, tmp_path, caplog, sig):
    runner = RouteSAETrainingRunner(small_config(tmp_path), None, tinyllama)
    stop_at(runner, 5, lambda: os.kill(os.getpid(), sig))
    with pytest.raises(InterruptedException):
        runner.run()
    checkpoint = newest_checkpoint(tmp_path)
    assert run_state(checkpoint)["n_training_samples"] == 6 * STEP
    assert f"resume with `sae-lens-route train --resume {tmp_path}`" in caplog.text
    with pytest.raises(UserError, match=r"holds a run that ended after .*384 tokens; resume with"):
        RouteSAETrainingRunner(small_config(tmp_path))


@pytest.mark.parametrize("prefetch", [False, 2])
def test_an_error_of_the_data_costs_no_step_and_names_the_row(
    tinyllama, tmp_path, caplog, prefetch
):
    texts = [f"a text with the number {i} and some more words in it" for i in range(400)]
    texts[300] = None
    whole, broken = (
        [text or texts[0] for text in texts],
        Dataset.from_dict({"text": texts}),
    )
    options = {"training_tokens": STEP * 200, "prefetch_llm_batches": prefetch}
    runner = RouteSAETrainingRunner(small_config(tmp_path / "a", **options), broken, tinyllama)
    with pytest.raises(UserError, match="row 300: column 'text' holds None, not text; repair"):
        runner.run()
    assert "sae-lens-route train --resume" in caplog.text
    n_steps = runner._n_steps
    assert run_state(newest_checkpoint(tmp_path / "a"))["n_training_samples"] == n_steps * STEP > 0
    repaired = Dataset.from_dict({"text": whole})
    cfg = small_config(tmp_path / "a", resume_from_checkpoint=str(tmp_path / "a"), **options)
    rest = RouteSAETrainingRunner(cfg, repaired, tinyllama).run()
    never = RouteSAETrainingRunner(small_config(None, **options), repaired, tinyllama).run()
    assert_same_bits(never, rest)


def test_any_error_between_steps_leaves_a_checkpoint(tinyllama, tmp_path):
    runner = RouteSAETrainingRunner(small_config(tmp_path), None, tinyllama)
    stop_at(runner, 5, fail(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        runner.run()
    assert run_state(newest_checkpoint(tmp_path))["n_training_samples"] == 5 * STEP


def test_an_error_within_a_step_leaves_none(tinyllama, tmp_path):
    """Weights and moments may belong to different steps then."""
    runner = RouteSAETrainingRunner(small_config(tmp_path, n_checkpoints=3), None, tinyllama)
    forward, calls = runner.sae.training_forward_pass, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            raise ZeroDivisionError
        return forward(*args, **kwargs)

    runner.sae.training_forward_pass = failing
    with pytest.raises(ZeroDivisionError):
        runner.run()
    assert run_state(newest_checkpoint(tmp_path))["n_training_samples"] == 4 * STEP


def test_a_killed_runs_log_is_continued_without_duplicates(tinyllama, finished, interrupted):
    log = interrupted / "train_log.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join([*lines, '{"step": 13, "tok']))
    cfg = small_config(interrupted, resume_from_checkpoint=str(interrupted), n_checkpoints=3)
    RouteSAETrainingRunner(cfg, None, tinyllama).run()
    without = [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in records(finished)]
    again = [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in records(interrupted)]
    assert again == without


def test_two_runs_cannot_write_to_one_folder(tinyllama, tmp_path):
    runner = RouteSAETrainingRunner(small_config(tmp_path), None, tinyllama)
    with locked(tmp_path), pytest.raises(UserError, match="another run is writing"):
        runner.run()
    first = RouteSAETrainingRunner(small_config(tmp_path), None, tinyllama)
    first.run()
    with pytest.raises(UserError, match="already holds a run"):
        runner.run()


# --- the disk ------------------------------------------------------------------------------------

OPERATIONS = [
    (Path, "open"),
    (Path, "mkdir"),
    (Path, "rename"),
    (Path, "replace"),
    (os, "fsync"),
    (os, "open"),
]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize(("owner", "name"), OPERATIONS, ids=lambda value: str(value))
def test_a_disk_that_fails_ends_in_one_line_with_whole_checkpoints(
    tinyllama, finished, tmp_path, monkeypatch, owner, name, code
):
    """From the second checkpoint on, each operation in turn fails and keeps failing."""
    cfg = small_config(tmp_path / "run", n_checkpoints=3)
    runner = RouteSAETrainingRunner(cfg, None, tinyllama)
    real = getattr(owner, name)

    def failing(*args, **kwargs):
        target = str(args[0])
        if "run" in target and not target.endswith("latest"):
            raise OSError(code, os.strerror(code), target)
        if owner is os and name == "fsync":
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    stop_at(runner, 5, lambda: monkeypatch.setattr(owner, name, failing))
    with pytest.raises(UserError, match=os.strerror(code)):
        runner.run()
    monkeypatch.undo()
    checkpoints = [p for p in (tmp_path / "run" / "checkpoints").glob("*/*") if is_whole(p)]
    assert [run_state(path)["n_training_samples"] for path in checkpoints] == [4 * STEP]
    assert not (tmp_path / "run" / "cfg.json").exists()
    cfg = small_config(
        tmp_path / "run", n_checkpoints=3, resume_from_checkpoint=str(tmp_path / "run")
    )
    RouteSAETrainingRunner(cfg, None, tinyllama).run()
    assert_same_bits(SAE.load_from_disk(finished), SAE.load_from_disk(tmp_path / "run"))


def test_a_folder_that_is_removed_in_the_middle_loses_no_step(tinyllama, finished, tmp_path):
    runner = RouteSAETrainingRunner(small_config(tmp_path / "run"), None, tinyllama)
    stop_at(runner, 9, lambda: shutil.rmtree(tmp_path / "run"))
    with pytest.raises(UserError, match=r"train_log\.jsonl' cannot be written: No such file"):
        runner.run()
    checkpoint = newest_checkpoint(tmp_path / "run")
    assert run_state(checkpoint)["n_training_samples"] == 10 * STEP


def test_a_full_disk_at_the_last_save_loses_nothing(tinyllama, finished, tmp_path, monkeypatch):
    cfg = small_config(tmp_path / "run", n_checkpoints=1)
    runner = RouteSAETrainingRunner(cfg, None, tinyllama)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(RouteSAETrainingRunner, "save_final_sae", lambda *_: fail(full)())
    with pytest.raises(UserError, match="No space left on device"):
        runner.run()
    monkeypatch.undo()
    assert run_state(newest_checkpoint(tmp_path / "run"))["n_training_samples"] == 12 * STEP
    RouteSAETrainingRunner(resumed_config(tmp_path / "run", {}), None, tinyllama).run()
    assert_same_bits(SAE.load_from_disk(finished), SAE.load_from_disk(tmp_path / "run"))


def test_a_read_only_folder_is_one_line(tinyllama, tmp_path):
    (tmp_path / "file").touch()  # root may write to a read-only folder, but not below a file
    cfg = small_config(tmp_path / "file" / "run")
    with pytest.raises(UserError, match="run' cannot be written"):
        RouteSAETrainingRunner(cfg, None, tinyllama).run()


def test_no_pickle_is_written_or_read(tinyllama, interrupted, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("pickle")

    assert not [path for path in interrupted.rglob("*") if path.suffix in (".pt", ".bin", ".pkl")]
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch, "save", refuse)
    cfg = small_config(interrupted, resume_from_checkpoint=str(interrupted), n_checkpoints=3)
    with suppress(InterruptedException):
        RouteSAETrainingRunner(cfg, None, tinyllama).run()
    assert (interrupted / "cfg.json").exists()


def test_the_model_of_another_path_is_not_needed_to_refuse(interrupted):
    assert Path(TINYLLAMA).exists()
    cfg = small_config(interrupted, model_name="./nowhere", resume_from_checkpoint=str(interrupted))
    with pytest.raises(UserError, match=r"model_name='.*tinyllama', not '\./nowhere'"):
        RouteSAETrainingRunner(cfg)
