"""SAEDashboard on a RouteSAE; runs where the `dashboard` extra is installed."""

import json
import re
import sys
from importlib.util import find_spec

import pytest
import torch
from sae_lens import SAE
from support.architectures import every_architecture
from support.pages import BLOCKS, Page, in_browser, open_page, routed_sae
from support.selection import to_look_at_first
from support.small import TINYLLAMA_WIDTH

from sae_lens_route.dashboards.sae_dashboard import (
    plain_sae,
    sae_dashboard_data,
    sae_dashboard_pages,
)
from sae_lens_route.errors import UserError

# it shows 5 tokens on either side and reads one before them, so no activation nearer to an end
WITH_NEIGHBORS = slice(6, -5)

with_sae_dashboard = pytest.mark.skipif(
    find_spec("sae_dashboard") is None,
    reason="sae-dashboard is not installed here (its environment: the dashboard extra)",
)


def test_the_error_says_how_to_install_sae_dashboard(model, sae, tokens, monkeypatch):
    for name in ("sae_dashboard", "sae_dashboard.data_writing_fns"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=re.escape("pip install 'sae-lens-route[dashboard]'")):
        sae_dashboard_data(model, sae, tokens)


def test_plain_sae_encodes_as_the_routed_one_and_shares_nothing(model):
    sae = routed_sae(model)
    x = torch.randn(7, TINYLLAMA_WIDTH)
    plain = plain_sae(sae)
    assert plain.cfg.architecture() == "topk"
    assert torch.equal(plain.encode(x), sae.encode(x))
    before = sae.W_dec.detach().clone()
    plain.W_dec.data.zero_()
    plain.cfg.metadata.hook_names.append("x")
    assert torch.equal(sae.W_dec, before) and len(sae.cfg.metadata.hook_names) == len(BLOCKS)


def acts_of(model, sae, tokens, excluded=None):
    """Activations in units of n(x), zero at excluded ids, by default the special ones."""
    names = sae.cfg.metadata.hook_names
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=names)
        routing = sae.route(torch.stack([cache[name] for name in names], dim=2))
        acts = sae.encode(routing.x_route) / routing.weight.unsqueeze(-1)
    ids = model.tokenizer.all_special_ids if excluded is None else excluded
    return acts.masked_fill(torch.isin(tokens, torch.tensor(ids))[..., None], 0)


def first_of(acts, n_features):
    n_kept = int((acts > 0).any(-1).sum())  # every kept token has active features
    return to_look_at_first(acts.numpy(), n_kept)[:n_features]


@pytest.fixture(scope="module")
def acts(model, sae, tokens):
    return acts_of(model, sae, tokens)


def assert_shows(data, acts, n_features):
    """The features to look at first, with the maxima and densities of `acts` [n, pos, d_sae]."""
    maxima = acts.amax((0, 1))
    assert list(data.feature_data_dict) == first_of(acts, n_features)
    inner_maxima = acts[:, WITH_NEIGHBORS].amax((0, 1))
    for feature, shown in data.feature_data_dict.items():
        strongest = max(
            act
            for group in shown.sequence_data.seq_group_data
            for sequence in group.seq_data
            for act in sequence.feat_acts
        )
        assert inner_maxima[feature] - 1e-4 <= strongest <= maxima[feature] + 1e-4
        density = f"{int((acts[..., feature] > 0).sum()) / acts[..., 0].numel():.3%}"
        assert density in shown.acts_histogram_data.title


@with_sae_dashboard
def test_maxima_it_shows_are_those_of_the_features(model, sae, tokens, acts):
    hooks = set(model.hook_dict)
    data = sae_dashboard_data(model, sae, tokens, n_features=12)
    assert data.cfg.hook_point == "blocks.11.route.hook_resid_post"
    assert_shows(data, acts, 12)
    assert set(model.hook_dict) == hooks, "the routed hook is removed"


@with_sae_dashboard
def test_excluded_ids_and_positions_are_excluded(model, tokens):
    sae = routed_sae(model)
    sae.cfg.metadata.exclude_special_tokens = [0, 7, 200]
    sae.cfg.metadata.seqpos_slice = (0, 30)
    acts = acts_of(model, sae, tokens, excluded=[0, 7, 200])
    acts[:, 30:] = 0
    data = sae_dashboard_data(model, sae, tokens, n_features=12)
    assert list(data.feature_data_dict) == first_of(acts, 12)
    for feature, shown in data.feature_data_dict.items():
        density = f"{int((acts[..., feature] > 0).sum()) / acts[..., 0].numel():.3%}"
        assert density in shown.acts_histogram_data.title


@with_sae_dashboard
@every_architecture
def test_every_architecture(make_trained, tinyllama, tokens, architecture, tmp_path):
    sae = SAE.load_from_disk(make_trained(architecture)[1])
    weights = {name: value.clone() for name, value in sae.state_dict().items()}
    acts = acts_of(tinyllama, sae, tokens)
    assert (acts.amax((0, 1)).topk(6).values > 0).all()
    assert_shows(sae_dashboard_data(tinyllama, sae, tokens, n_features=6), acts, 6)
    path = sae_dashboard_pages(tinyllama, sae, tokens, tmp_path / "p.html", n_features=6)
    text = path.read_text(encoding="utf-8")
    start = int(json.loads(re.search(r"const START_KEY = (\"\d+\");", text)[1]))
    assert start == first_of(acts, 1)[0]
    assert "<script src" not in text
    assert all(torch.equal(value, weights[name]) for name, value in sae.state_dict().items())


@with_sae_dashboard
def test_the_callers_sae_is_unchanged(model, tokens):
    sae = routed_sae(model)
    sae.W_dec.data.mul_(2.0)  # so that folding the decoder norm would change it
    acts_of(model, sae, tokens)  # creates the attributes that routing caches
    weights = {name: value.clone() for name, value in sae.state_dict().items()}
    config = json.dumps(sae.cfg.to_dict(), default=str)
    attributes = set(vars(sae))
    sae_dashboard_data(model, sae, tokens, features=[1, 2, 3])
    assert sae.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in sae.state_dict().items())
    assert json.dumps(sae.cfg.to_dict(), default=str) == config
    assert set(vars(sae)) == attributes and sae.training is False


@with_sae_dashboard
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
    with pytest.raises(UserError, match="no feature is active"):
        sae_dashboard_pages(model, sae, tokens, tmp_path / "p.html", features=[0, 1])
    with pytest.raises(UserError, match="at least 12"):
        sae_dashboard_pages(model, sae, tokens[:, :9], tmp_path / "p.html")


@with_sae_dashboard
@in_browser
def test_a_browser_draws_the_page(model, sae, tokens, acts, tmp_path):
    path = sae_dashboard_pages(model, sae, tokens, tmp_path / "p.html", n_features=4)
    dom, console = open_page(path.as_uri(), tmp_path / "profile")
    console = [line for line in console if "generated in" not in line]  # timings that the page logs
    assert console == []
    (best,) = first_of(acts, 1)
    assert re.search(rf'<option value="{best}" selected="true"', dom)
    classes = [attributes.get("class") for _, attributes in Page(dom).attributes]
    assert classes.count("token") > 100 and "point" in classes
    shown = [float(v) for v in re.findall(r"Feature activation</td><td[^>]*>([-+.\d]+)", dom)]
    assert max(shown) == pytest.approx(float(acts[:, WITH_NEIGHBORS, best].max()), abs=2e-3)
