"""What a trainer shows and logs, when it stops, and SAELens's evaluation during training."""

import json
import os
import re
import signal
from types import SimpleNamespace

import pytest
import torch
from sae_lens import LoggingConfig
from sae_lens.training.activation_scaler import ActivationScaler
from support.small import TINYLLAMA_WIDTH, small_config

from sae_lens_route.config import training_config
from sae_lens_route.errors import UserError
from sae_lens_route.training.runner import RouteSAETrainingRunner
from sae_lens_route.training.trainer import TrainLog, stop_after_this_step


def logged(folder, model, architecture="route_topk", every=1, **changes):
    """The records of a run."""
    cfg = small_config(folder, logger=LoggingConfig(False, wandb_log_frequency=every), **changes)
    values = {"d_in": TINYLLAMA_WIDTH, "d_sae": 96, "k": 8}
    cfg.sae = training_config(architecture, values)
    RouteSAETrainingRunner(cfg, None, model).run()
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]


def test_shares_are_logged_by_block(tinyllama, tmp_path):
    records = logged(tmp_path, tinyllama, routed_blocks=[2, 5, 9])
    for record in records:
        shares = {key: share for key, share in record.items() if "share" in key}
        assert list(shares) == [f"route_share/block_{block}" for block in (2, 5, 9)]
        assert sum(shares.values()) == pytest.approx(1)


@pytest.mark.parametrize(("every", "steps"), [(1, list(range(1, 13))), (5, [5, 10, 12])])
def test_every_few_steps_and_the_last_are_logged(tinyllama, tmp_path, every, steps):
    records = logged(tmp_path, tinyllama, every=every)
    assert [record["step"] for record in records] == steps
    for record in records:
        assert record["tokens"] == 64 * record["step"]
        assert record["tokens_per_second"] > 0
        assert record.keys() >= {"loss", "l0", "dead_features", "current_learning_rate"}


def test_a_run_without_a_folder_logs_nothing(tmp_path):
    TrainLog(None, every=1).write([{"step": 1}])
    log = TrainLog(tmp_path, every=1)
    log.write([{"step": 1}, {"step": 1}])
    log.write([{"step": 2}])
    assert [json.loads(line)["step"] for line in log.file.read_text().splitlines()] == [1, 1, 2]


@pytest.mark.parametrize(
    ("architecture", "shown"),
    [("route_topk", r"L0 8\.0  blocks 3-11: \d"), ("crosscoder_topk", r"L0 8\.0(?!  blocks)")],
)
def test_the_progress_line_has_shares_where_there_is_a_router(
    tinyllama, tmp_path, capsys, architecture, shown
):
    logged(tmp_path, tinyllama, architecture)
    err = capsys.readouterr().err
    assert f"Training {architecture}" in err
    assert re.search(shown, err)


def test_a_loss_of_nan_stops_the_run(tinyllama):
    runner = RouteSAETrainingRunner(small_config(None, lr=1e30), None, tinyllama)
    with pytest.raises(UserError, match=r"not finite after step \d+: lower lr=1e\+30"):
        runner.run()


def test_the_first_signal_asks_for_a_stop_and_the_second_acts():
    trainer = SimpleNamespace(stop_requested=False)
    others = signal.signal(signal.SIGINT, signal.default_int_handler)  # SAELens's runners leave one
    try:
        with pytest.raises(KeyboardInterrupt), stop_after_this_step(trainer):
            os.kill(os.getpid(), signal.SIGINT)
            assert trainer.stop_requested
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, others)


@pytest.mark.parametrize("architecture", ["route_topk", "multi_layer_topk", "crosscoder_topk"])
def test_saelens_evaluates_during_training_at_the_hook(tinyllama, architecture):
    cfg = small_config(None, n_eval_batches=1)
    cfg.sae = training_config(architecture, {"d_in": TINYLLAMA_WIDTH, "d_sae": 96, "k": 8})
    runner = RouteSAETrainingRunner(cfg, None, tinyllama)
    sae = runner.run()
    with torch.no_grad():
        metrics = runner.evaluator(sae, iter(()), ActivationScaler())
    assert 0 < metrics["model_performance_preservation"]["ce_loss_with_sae"] < 20
    assert sae.cfg.metadata.hook_name not in tinyllama.hook_dict
