"""SAEDashboard on a RouteSAE; runs where the `dashboard` extra is installed."""

import json
import re

import pytest
import torch
from sae_lens import SAE
from small import TINYLLAMA, tokens_dataset
from test_architectures import every_architecture, make_trained, tinyllama  # noqa: F401
from test_dashboards import Page, in_browser, open_page, routed_sae

from sae_lens_route.models import load_model
from sae_lens_route.sae_dashboard import sae_dashboard_data, sae_dashboard_pages

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


def acts_of(model, sae, tokens):
    """What `sae.encode` gives at the routed activations, zero at special tokens."""
    names = sae.cfg.metadata.hook_names
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=names)
        acts = sae.encode(sae.route(torch.stack([cache[name] for name in names], dim=2)).x_route)
    special = torch.isin(tokens, torch.tensor(model.tokenizer.all_special_ids))
    return acts.masked_fill(special[..., None], 0)


@pytest.fixture(scope="module")
def acts(model, sae, tokens):
    return acts_of(model, sae, tokens)


def assert_shows(data, acts, n_features):
    """The strongest features, with the maxima and densities of `acts` [n, pos, d_sae]."""
    maxima = acts.amax((0, 1))
    assert list(data.feature_data_dict) == maxima.argsort(descending=True)[:n_features].tolist()
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
        density = f"{int((acts[..., feature] > 0).sum()) / acts[..., 0].numel():.3%}"
        assert density in shown.acts_histogram_data.title


def test_maxima_it_shows_are_those_of_encode(model, sae, tokens, acts):
    hooks = set(model.hook_dict)
    assert_shows(sae_dashboard_data(model, sae, tokens, n_features=12), acts, 12)
    assert set(model.hook_dict) == hooks, "the routed hook is gone again"


@every_architecture
def test_every_architecture(make_trained, tinyllama, tokens, architecture, tmp_path):  # noqa: F811
    sae = SAE.load_from_disk(make_trained(architecture)[1])
    weights = {name: value.clone() for name, value in sae.state_dict().items()}
    acts = acts_of(tinyllama, sae, tokens)
    assert (acts.amax((0, 1)).topk(6).values > 0).all()
    assert_shows(sae_dashboard_data(tinyllama, sae, tokens, n_features=6), acts, 6)
    path = sae_dashboard_pages(tinyllama, sae, tokens, tmp_path / "p.html", n_features=6)
    text = path.read_text(encoding="utf-8")
    start = int(json.loads(re.search(r"const START_KEY = (\"\d+\");", text)[1]))
    assert start == int(acts.amax((0, 1)).argmax())
    assert "<script src" not in text
    assert all(torch.equal(value, weights[name]) for name, value in sae.state_dict().items())


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
