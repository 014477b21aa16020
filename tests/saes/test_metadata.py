"""Blocks and hook names in the metadata, and folders that were saved before 0.1.0."""

import json

import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.sae import SAEMetadata, TrainingSAE
from safetensors.torch import save_file
from support.splice import hooked_model

from sae_lens_route.errors import UserError
from sae_lens_route.saes import RouteTopKSAE, RouteTopKSAEConfig
from sae_lens_route.saes.metadata import (
    blocks_of_hooks,
    crosscoder_hook_name,
    route_names,
    routed_blocks,
    routed_hook_name,
    source_hook_names,
)
from sae_lens_route.splice import attach

BLOCKS = [2, 5, 7]
NAMES = [f"blocks.{block}.hook_resid_post" for block in BLOCKS]


def sae_with(**metadata):
    config = RouteTopKSAEConfig(
        d_in=8, d_sae=16, k=4, n_routed_layers=3, metadata=SAEMetadata(**metadata)
    )
    return RouteTopKSAE(config)


@pytest.mark.parametrize(
    "metadata",
    [
        {"routed_blocks": BLOCKS},
        {"routed_layers": BLOCKS},
        {"hook_names": NAMES},
        {"hook_names": [f"blocks.{block}.hook_out" for block in BLOCKS]},
        {"hook_names": [f"model.layers.{block}" for block in BLOCKS]},
    ],
)
def test_blocks_are_named_or_read_off_the_hook_names(metadata):
    assert routed_blocks(sae_with(**metadata)) == BLOCKS


def test_route_names_are_blocks_where_the_metadata_has_them():
    assert route_names(sae_with(routed_blocks=BLOCKS)) == ["block_2", "block_5", "block_7"]
    assert route_names(sae_with()) == ["route_0", "route_1", "route_2"]


def test_what_does_not_fit_is_named():
    with pytest.raises(UserError, match=r"routed_blocks=\[2, 5\]: the SAE has n_routed_layers=3"):
        routed_blocks(sae_with(routed_blocks=[2, 5]))
    with pytest.raises(UserError, match=r"hook_names=\[\]: the SAE has n_routed_layers=3"):
        routed_blocks(sae_with())
    with pytest.raises(UserError, match=r"hook_names=\['a', 'b'\]: the SAE has"):
        source_hook_names(sae_with(hook_names=["a", "b"]))
    with pytest.raises(UserError, match=r"hook_names=\['blocks.3.hook_mlp_out'\]: not residual"):
        blocks_of_hooks(["blocks.2.hook_resid_post", "blocks.3.hook_mlp_out"])


def test_hooks_look_like_residual_streams_of_the_last_block():
    assert routed_hook_name(11) == "blocks.11.route.hook_resid_post"
    assert crosscoder_hook_name(11) == "blocks.11.stack.hook_resid_post"


# --- folders from before 0.1.0 --------------------------------------------------------------------

OLD_CFG = """{
  "d_in": 32, "d_sae": 64, "dtype": "float64", "device": "cpu", "apply_b_dec_to_input": true,
  "normalize_activations": "none", "reshape_activations": "none", "k": 8,
  "rescale_acts_by_decoder_norm": false, "n_routed_layers": 3, "routing": "uniform",
  "aggregation": "sum", "routing_seed": 0, "layer_shares": [0.5, 0.25, 0.25],
  "metadata": {
    "sae_lens_version": "6.54.12", "sae_lens_training_version": "6.54.12",
    "model_name": "demo", "hook_name": "blocks.5.hook_resid_route",
    "hook_names": ["blocks.2.hook_resid_post", "blocks.3.hook_resid_post",
                   "blocks.5.hook_resid_post"],
    "routed_layers": [2, 3, 5], "context_size": 128, "prepend_bos": true,
    "exclude_special_tokens": true, "training_architecture": "route_topk"
  },
  "architecture": "route_topk"
}"""


@pytest.fixture
def old_folder(tmp_path):
    (tmp_path / "cfg.json").write_text(OLD_CFG)
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (32, 64), "W_dec": (64, 32), "b_enc": (64,), "b_dec": (32,)}
    weights = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in {**shapes, "W_router": (32, 3)}.items()
    }
    save_file(weights, tmp_path / "sae_weights.safetensors")
    return tmp_path


def test_an_old_folder_loads_attaches_and_is_saved_with_the_new_names(old_folder, tmp_path):
    sae = SAE.load_from_disk(old_folder)
    assert sae.cfg.route_shares == [0.5, 0.25, 0.25]
    assert routed_blocks(sae) == [2, 3, 5]
    assert route_names(sae) == ["block_2", "block_3", "block_5"]

    model = hooked_model("llama")
    tokens = torch.arange(2, 14).view(2, 6)
    clean = model(tokens)
    with torch.no_grad(), attach(model, sae) as hook:
        assert hook.name == "blocks.5.hook_resid_route" and hook.routed_blocks == [2, 3, 5]
        read = model.run_with_cache(tokens, names_filter=[hook.name])[1][hook.name]
        assert read.shape == (2, 6, 32)
        zero = [(hook.name, lambda value, hook: torch.zeros_like(value))]
        assert not torch.equal(model.run_with_hooks(tokens, fwd_hooks=zero), clean)
    assert torch.equal(model(tokens), clean)

    sae.save_model(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "cfg.json").read_text())
    assert written["route_shares"] == [0.5, 0.25, 0.25]
    assert "layer_shares" not in written
    assert written["metadata"]["hook_name"] == "blocks.5.hook_resid_route"


def test_an_old_training_checkpoint_loads_too():
    old = {**json.loads(OLD_CFG), "loss": "mse", "decoder_norm_interval": 5}
    sae = TrainingSAE.from_dict(old)
    assert (sae.cfg.route_shares, sae.cfg.loss) == ([0.5, 0.25, 0.25], "mse")
    assert "layer_shares" not in {**sae.cfg.to_dict(), **sae.cfg.get_inference_sae_cfg_dict()}
