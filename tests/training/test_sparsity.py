"""`sparsity.safetensors`: log10 of the share of the encoded vectors that a feature fires on."""

import pytest
import torch
from safetensors.torch import load_file
from support.small import TINYLLAMA_WIDTH, small_config

from sae_lens_route.config import training_config
from sae_lens_route.training.entries import SweepEntry
from sae_lens_route.training.runner import RouteSAETrainingRunner
from sae_lens_route.training.sweep import SweepRunner

ARCHITECTURES = ["route_topk", "multi_layer_topk", "crosscoder_topk"]
K, BLOCKS = 8, [3, 5, 9]


def shares(folder):
    return 10 ** load_file(folder / "sparsity.safetensors")["sparsity"].double()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shares_sum_to_the_features_per_vector(tinyllama, tmp_path, architecture):
    """k of 96 features fire on each vector, at most: an MLSAE encodes three vectors per token."""
    cfg = small_config(tmp_path, routed_blocks=BLOCKS)
    cfg.sae = training_config(architecture, {"d_in": TINYLLAMA_WIDTH, "d_sae": 96, "k": K})
    sae = RouteSAETrainingRunner(cfg, None, tinyllama).run()
    # float32 logarithms: 1e-6 of each share; ReLU may switch off some of the k
    assert float(shares(tmp_path).sum()) == pytest.approx(K, rel=0.02)
    assert float(shares(tmp_path).sum()) <= K * (1 + 1e-5)
    assert sae.cfg.metadata.l0 == pytest.approx(float(shares(tmp_path).sum()), rel=1e-5)


def test_a_sweep_writes_the_same_shares(tinyllama, tmp_path):
    entries = {
        architecture: SweepEntry(
            training_config(architecture, {"d_in": TINYLLAMA_WIDTH, "d_sae": 96, "k": K}), seed=42
        )
        for architecture in ("route_topk", "multi_layer_topk")
    }
    cfg = small_config(tmp_path / "sweep", routed_blocks=BLOCKS)
    SweepRunner(cfg, entries, override_model=tinyllama).run()
    for architecture, entry in entries.items():
        alone = small_config(tmp_path / architecture, routed_blocks=BLOCKS, seed=42)
        alone.sae = entry.sae
        RouteSAETrainingRunner(alone, None, tinyllama).run()
        found = shares(tmp_path / "sweep" / architecture)
        assert torch.equal(found, shares(tmp_path / architecture)), architecture
