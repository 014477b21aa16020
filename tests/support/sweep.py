"""Sweeps on the tiny Llama: entries of every kind, and a run of twelve steps."""

from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE

from sae_lens_route.config import RouteSAERunnerConfig
from sae_lens_route.training.entries import SweepEntry, expand_runs
from support.small import TINYLLAMA_WIDTH, small_config

STEPS, STEP_TOKENS = 12, 64
CONSTANT_LR = {"lr_warm_up_steps": 0, "lr_decay_steps": 0}
BLOCKS = [3, 4, 5, 6, 7]
ROUTED = {
    "hard": {"k": [4, 8]},
    "mean": {"k": 8, "aggregation": "mean", "loss": "mse"},
    "assignment": {"k": 8, "router_objective": "assignment"},
    "frozen": {"k": 8, "router_objective": "frozen"},
    "uniform": {"k": 8, "routing": "uniform"},
    "shares": {"k": 8, "routing": "uniform", "route_shares": [0.5, 0.2, 0.1, 0.1, 0.1]},
    "soft": {"k": 8, "routing": "soft"},
    "batchtopk": {"k": 8, "architecture": "route_batchtopk"},
    "jumprelu": {"architecture": "route_jumprelu"},
    "gated": {"architecture": "route_gated"},
    "multi-layer": {"k": 8, "architecture": "multi_layer_topk"},
    "crosscoder": {"architecture": "crosscoder"},
    "crosscoder of two": {"k": 8, "architecture": "crosscoder_topk", "blocks": [3, 6]},
    "first blocks": {"k": 8, "blocks": [3, 4, 5]},
    "blocks with a gap": {"k": 8, "blocks": [4, 6]},
    "one block": {"k": 8, "blocks": [7]},
}
PLAIN = {
    "plain topk": {"k": 8, "architecture": "topk", "blocks": [5]},
    "plain gated": {"architecture": "gated", "blocks": [7]},
}
FEW = {
    "hard": {"k": [4, 8]},
    "uniform": {"k": 8, "routing": "uniform"},
    "batchtopk": {"k": 8, "architecture": "route_batchtopk"},
    "plain": {"k": 8, "architecture": "topk", "blocks": [7]},
    "crosscoder": {"architecture": "crosscoder_topk", "k": 8, "blocks": [3, 5, 7]},
}


def sized_entries(
    runs: dict[str, dict[str, Any]], seeds: tuple[int, ...] = (0,)
) -> dict[str, SweepEntry]:
    """Entries of 96 features."""
    sized = {label: {"d_sae": 96, **settings} for label, settings in runs.items()}
    return expand_runs(sized, TINYLLAMA_WIDTH, seeds)


def one_entry(**settings: Any) -> SweepEntry:
    """An entry with k = 8 unless the settings say otherwise."""
    (entry,) = sized_entries({"x": {"k": 8, **settings}}).values()
    return entry


def sweep_settings(output_path: Path | None = None, **changes: Any) -> RouteSAERunnerConfig:
    """Twelve steps of 64 tokens over blocks 3 to 7."""
    return small_config(output_path, **{"routed_blocks": BLOCKS, **changes})


def assert_same_bits(a: SAE[Any], b: SAE[Any]) -> None:
    """All weights are bit-identical."""
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, weight in a.state_dict().items():
        assert torch.equal(weight, b.state_dict()[name]), name
