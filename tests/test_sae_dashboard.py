"""SAEDashboard on a RouteSAE; runs where the `dashboard` extra is installed."""

import json
import re
from dataclasses import dataclass

import pytest
import torch
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from small import TINYLLAMA, tokens_dataset
from test_dashboards import BLOCKS, Page, in_browser, open_page, routed_sae

from sae_lens_route.dashboards import sae_dashboard_data, sae_dashboard_pages
from sae_lens_route.models import load_model
from sae_lens_route.saes import RoutedConfig, RoutedSAE

pytest.importorskip(
    "sae_dashboard",
    reason="sae-dashboard is not installed here (its environment: the dashboard extra)",
)


@pytest.fixture(scope="module")
def model():
    return load_model(TINYLLAMA)


@pytest.fixture(scope="module")
def sae(model):
    return routed_sae(model)


@pytest.fixture(scope="module")
def tokens():
    return torch.tensor(tokens_dataset(20, 48)["tokens"])


@pytest.fixture(scope="module")
def acts(model, sae, tokens):
    """What `sae.encode` gives at the routed activations, zero at special tokens."""
    names = sae.cfg.metadata.hook_names
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=names)
        acts = sae.encode(sae.route(torch.stack([cache[name] for name in names], dim=2)).x_route)
    special = torch.isin(tokens, torch.tensor(model.tokenizer.all_special_ids))
    return acts.masked_fill(special[..., None], 0)


def test_maxima_it_shows_are_those_of_encode(model, sae, tokens, acts):
    hooks = set(model.hook_dict)
    data = sae_dashboard_data(model, sae, tokens, n_features=12)
    maxima = acts.amax((0, 1))
    assert list(data.feature_data_dict) == maxima.argsort(descending=True)[:12].tolist()
    # it shows 5 tokens on either side, so never what is nearer to an end
    inner_maxima = acts[:, 5:-5].amax((0, 1))
    for feature, shown in data.feature_data_dict.items():
        strongest = max(
            act
            for group in shown.sequence_data.seq_group_data
            for sequence in group.seq_data
            for act in sequence.feat_acts
        )
        assert inner_maxima[feature] - 1e-4 <= strongest <= maxima[feature] + 1e-4
        density = f"{int((acts[..., feature] > 0).sum()) / tokens.numel():.3%}"
        assert density in shown.acts_histogram_data.title
    assert set(model.hook_dict) == hooks, "the routed hook is gone again"


@dataclass
class RouteJumpReLUSAEConfig(RoutedConfig, JumpReLUSAEConfig):
    """What SAELens saves batchtopk and its kin as."""


class RouteJumpReLUSAE(RoutedSAE, JumpReLUSAE):
    cfg: RouteJumpReLUSAEConfig


def test_a_base_without_topk(model, sae, tokens):
    metadata = sae.cfg.metadata
    cfg = RouteJumpReLUSAEConfig(
        d_in=sae.cfg.d_in, d_sae=sae.cfg.d_sae, n_routed_layers=len(BLOCKS), metadata=metadata
    )
    jumprelu = RouteJumpReLUSAE(cfg)
    weights = {**sae.state_dict(), "threshold": torch.full((sae.cfg.d_sae,), 0.5)}
    jumprelu.load_state_dict(weights)
    names = metadata.hook_names
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=names)
        acts = jumprelu.encode_layers(torch.stack([cache[name] for name in names], dim=2))
    special = torch.isin(tokens, torch.tensor(model.tokenizer.all_special_ids))
    acts = acts.masked_fill(special[..., None], 0)
    data = sae_dashboard_data(model, jumprelu, tokens, n_features=5)
    assert set(data.feature_data_dict) == set(acts.amax((0, 1)).topk(5).indices.tolist())
    for feature, shown in data.feature_data_dict.items():
        density = f"{int((acts[..., feature] > 0).sum()) / tokens.numel():.3%}"
        assert density in shown.acts_histogram_data.title
    assert torch.equal(jumprelu.threshold, weights["threshold"])


def test_the_callers_sae_stays_as_it_is(model, tokens):
    sae = routed_sae(model)
    sae.W_dec.data.mul_(2.0)  # what folding the decoder norm would change
    weights = {name: value.clone() for name, value in sae.state_dict().items()}
    config = json.dumps(sae.cfg.to_dict(), default=str)
    attributes = set(vars(sae))
    sae_dashboard_data(model, sae, tokens, features=[1, 2, 3])
    assert sae.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in sae.state_dict().items())
    assert json.dumps(sae.cfg.to_dict(), default=str) == config
    assert set(vars(sae)) == attributes and sae.training is False


def test_page_is_self_contained_and_opens_on_a_live_feature(model, tokens, tmp_path):
    sae = routed_sae(model)
    sae.b_enc.data[[0, 1]] = -1e6
    path = sae_dashboard_pages(
        model, sae, tokens, tmp_path / "new" / "p.html", features=[0, 1, 2, 3]
    )
    text = path.read_text(encoding="utf-8")
    assert text.startswith('<!DOCTYPE html>\n<meta charset="utf-8">')
    assert "<script src" not in text
    start = int(json.loads(re.search(r"const START_KEY = (\"\d+\");", text)[1]))
    assert start in (2, 3)
    assert len(Page(text).scripts) == 3
    with pytest.raises(ValueError, match="no feature is active"):
        sae_dashboard_pages(model, sae, tokens, tmp_path / "p.html", features=[0, 1])
    with pytest.raises(ValueError, match="at least 12"):
        sae_dashboard_pages(model, sae, tokens[:, :9], tmp_path / "p.html")


@in_browser
def test_a_browser_draws_the_page(model, sae, tokens, acts, tmp_path):
    path = sae_dashboard_pages(model, sae, tokens, tmp_path / "p.html", n_features=4)
    dom, console = open_page(path.as_uri(), tmp_path / "profile")
    console = [line for line in console if "generated in" not in line]  # the page's own timings
    assert console == []
    best = int(acts.amax((0, 1)).argmax())
    assert re.search(rf'<option value="{best}" selected="true"', dom)
    classes = [attributes.get("class") for _, attributes in Page(dom).attributes]
    assert classes.count("token") > 100 and "point" in classes
    shown = [float(v) for v in re.findall(r"Feature activation</td><td[^>]*>([-+.\d]+)", dom)]
    assert max(shown) == pytest.approx(float(acts[:, 5:-5, best].max()), abs=2e-3)
