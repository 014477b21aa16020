"""Conversion to an SAE for inference keeps what was trained."""

import pytest
import torch
from sae_lens import SAE, AbsTopKTrainingSAE, AbsTopKTrainingSAEConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.gated_sae import GatedTrainingSAE, GatedTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from support.architectures import (
    ARCHITECTURES,
    every_architecture,
    random_sae,
    structured_streams,
    train,
    training_config,
)

from sae_lens_route.saes.inference import as_routed, to_inference
from sae_lens_route.saes.routed import RoutedSAEMixin
from sae_lens_route.saes.router import normalize


@every_architecture
def test_conversion_before_saving_is_the_same(architecture, tmp_path):
    """The training SAE as the optimizer left it: converting must not change it, saving may."""
    sae = random_sae(architecture, decoder_norm_interval=10)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    converted = to_inference(sae)
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())
    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path).state_dict()
    for name, value in converted.state_dict().items():
        assert torch.equal(value, loaded[name]), name
    sae.save_inference_model(tmp_path)
    again = SAE.load_from_disk(tmp_path).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in again.items())


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_saved_as_jumprelu_the_same_features_fire(architecture, tmp_path):
    """The saved threshold is an average over steps (rate 0.01) of the batches' least activation."""
    torch.manual_seed(0)
    sae = ARCHITECTURES[architecture][0](
        training_config(architecture, d_in=24, d_sae=48, k=4, n_routed_layers=3)
    )
    train(sae, structured_streams(1000 * 256, seed=0).split(256))
    sae.save_inference_model(tmp_path)
    saved = SAE.load_from_disk(tmp_path)
    x = structured_streams(2048, seed=1)
    with torch.no_grad():
        x_route = sae.route(x).x_route
        in_batch, alone = sae.encode(x_route) > 0, saved.encode(x_route) > 0
        assert torch.equal(saved.route(x).x_route, x_route)
        error = (saved(x_route) - x_route).pow(2).sum(-1) / x_route.pow(2).sum(-1)
    assert error.mean() < 0.5, "it learned something"
    assert in_batch.sum() == 4 * 2048
    jaccard = (in_batch & alone).sum() / (in_batch | alone).sum()
    assert jaccard >= 0.95


PLAIN = {
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig, {"k": 4}),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, {"k": 4}),
    "jumprelu": (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig, {"l0_coefficient": 0.1}),
    "standard": (StandardTrainingSAE, StandardTrainingSAEConfig, {"l1_coefficient": 0.1}),
    "gated": (GatedTrainingSAE, GatedTrainingSAEConfig, {"l1_coefficient": 0.1}),
}


@pytest.mark.parametrize("architecture", PLAIN)
def test_a_plain_sae_as_a_routesae_of_one_layer(architecture, tmp_path):
    """Trained by SAELens alone on n(x) of one layer; then exactly what SAELens saves, routed."""
    torch.manual_seed(0)
    plain_class, config_class, options = PLAIN[architecture]
    plain = plain_class(config_class(d_in=24, d_sae=48, **options))
    x = structured_streams(40 * 128, seed=0)[:, 1:2]
    train(plain, normalize(x[:, 0]).split(128))
    plain.save_inference_model(tmp_path)
    saved, routed = SAE.load_from_disk(tmp_path), as_routed(plain)

    assert isinstance(routed, RoutedSAEMixin) and routed.cfg.n_routed_layers == 1
    assert routed.cfg.architecture() == f"route_{saved.cfg.architecture()}"
    held_out = structured_streams(300, seed=1)[:, 1:2]
    with torch.no_grad():
        routing, n = routed.route(held_out), normalize(held_out[:, 0])
        assert torch.equal(routing.probs, torch.ones(300, 1)) and (routing.weight == 1).all()
        torch.testing.assert_close(routing.x_route, n)
        acts = saved.encode(n)
        assert 0 < (acts > 0).float().mean() < 1
        assert torch.equal(routed.encode(n), acts)
        assert torch.equal(routed.decode(acts), saved.decode(acts))
        if architecture != "batchtopk":  # which chooses by the batch while it trains
            torch.testing.assert_close(routed(n), plain(n), rtol=1e-4, atol=1e-5)
        routed.save_model(tmp_path / "routed")
        again = SAE.load_from_disk(tmp_path / "routed")
        assert torch.equal(again.encode_layers(held_out), routed.encode(routing.x_route))


def test_as_routed_names_what_has_no_routed_counterpart():
    plain = AbsTopKTrainingSAE(AbsTopKTrainingSAEConfig(d_in=8, d_sae=16, k=4))
    with pytest.raises(ValueError, match="'abstopk' has no routed counterpart 'route_abstopk'"):
        as_routed(plain)
