"""The multi-layer SAE: one dictionary for all streams, trained by the runner like any other."""

import json
import math

import pytest
import torch
from sae_lens import SAE
from support.architectures import a_step, random_streams
from support.small import TINYLLAMA_WIDTH, small_config, tokens_dataset

from sae_lens_route import RouteSAETrainingRunner, UserError
from sae_lens_route.saes import (
    MultiLayerTopKTrainingConfig,
    MultiLayerTopKTrainingSAE,
    RouteTopKSAE,
)


def test_a_step_reconstructs_every_stream_of_every_token():
    torch.manual_seed(0)
    sae = MultiLayerTopKTrainingSAE(
        MultiLayerTopKTrainingConfig(d_in=6, d_sae=12, k=3, n_routed_layers=3, dtype="float64")
    )
    x = random_streams(7)
    output = sae.training_forward_pass(a_step(x))
    total = 0.0
    for token in x:
        for h in token:
            n = (h - h.mean()) / (h.std() + 1e-6)
            pre = (n - sae.b_dec) @ sae.W_enc + sae.b_enc
            acts = torch.where(pre >= pre.sort().values[-3], pre.clamp(min=0), 0.0)
            error = acts @ sae.W_dec + sae.b_dec - n
            total += float(error.detach().pow(2).sum() / n.pow(2).sum()) / 21
    assert output.loss.item() == pytest.approx(total, rel=1e-12)
    assert output.metrics["route_share/route_2"] == 1 / 3
    assert output.metrics["route_entropy"] == math.log(3)


def test_trains_in_the_runner_and_is_saved_with_uniform_routing(tinyllama, tmp_path):
    cfg = small_config(tmp_path, routed_blocks=[3, 5, 9])
    cfg.sae = MultiLayerTopKTrainingConfig(d_in=TINYLLAMA_WIDTH, d_sae=96, k=8)
    RouteSAETrainingRunner(cfg, tokens_dataset(), tinyllama).run()
    log = [json.loads(line) for line in (tmp_path / "train_log.jsonl").read_text().splitlines()]
    assert [log[-1][f"route_share/block_{block}"] for block in (3, 5, 9)] == [1 / 3] * 3
    assert log[-1]["loss"] < log[0]["loss"]
    saved = SAE.load_from_disk(tmp_path)
    assert type(saved) is RouteTopKSAE and saved.cfg.routing == "uniform"


def test_there_is_no_router_to_choose():
    with pytest.raises(UserError, match="routing='hard': a multi-layer SAE has no router"):
        MultiLayerTopKTrainingConfig(d_in=6, d_sae=12, k=3, routing="hard")
