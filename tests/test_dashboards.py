"""Pages against the SAE's own activations, and opened in a browser that has no network."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from html import escape
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
import torch
from small import TINYLLAMA, TINYLLAMA_WIDTH, tokens_dataset

from sae_lens_route import RouteTopKSAE, RouteTopKSAEConfig
from sae_lens_route.activations import RoutedActivationsStore
from sae_lens_route.dashboards import (
    CONTEXT_TOKENS,
    N_BINS,
    N_CONTEXTS,
    VIOLIN_POINTS,
    dashboard_data,
    dashboard_html,
    route_heatmap,
    write_dashboard,
)
from sae_lens_route.features import ActivationBatch, find_contexts
from sae_lens_route.interpret import Answer
from sae_lens_route.models import has_transformer_bridge, load_model, residual_hook_names
from sae_lens_route.sae_dashboard import plain_sae, sae_dashboard_data

BLOCKS = [3, 5, 6, 9, 11]
HOSTILE = "</script><script>document.title='broken'</script><b>&amp;"


def routed_sae(model, routing="hard"):
    torch.manual_seed(0)
    sae = RouteTopKSAE(
        RouteTopKSAEConfig(
            d_in=TINYLLAMA_WIDTH, d_sae=96, k=8, n_routed_layers=len(BLOCKS), routing=routing
        )
    )
    sae.W_router.data.mul_(0.3)  # so that every block is chosen
    sae.W_dec.data.div_(sae.W_dec.data.norm(dim=-1, keepdim=True))
    metadata = sae.cfg.metadata
    metadata.hook_names = residual_hook_names(model, BLOCKS)
    metadata.hook_name = f"blocks.{BLOCKS[-1]}.hook_resid_route"
    metadata.model_name, metadata.context_size, metadata.prepend_bos = "tiny", 48, True
    metadata.exclude_special_tokens = False
    return sae.eval()


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
def streams(model, tokens):
    """Residual streams of all the tokens, from one plain forward pass."""
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    return torch.stack([cache[f"blocks.{i}.hook_resid_post"] for i in BLOCKS], dim=2)


@pytest.fixture(scope="module")
def acts(model, sae, tokens, streams):
    """Feature activations [tokens, d_sae] by `encode_layers`, zero at special tokens."""
    with torch.no_grad():
        acts = sae.encode_layers(streams)
    special = torch.isin(tokens, torch.tensor(model.tokenizer.all_special_ids))
    return acts.masked_fill(special[..., None], 0).flatten(0, 1).numpy(), ~special.flatten().numpy()


@pytest.fixture(scope="module")
def page(model, sae, tokens, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "new" / "features.html"
    strongest = dashboard_data(model, sae, tokens, n_features=2)["features"]
    answer = Answer("low-level", 5, HOSTILE)
    scores = {strongest[0]["feature"]: answer, strongest[1]["feature"]: 4.5}
    return write_dashboard(model, sae, tokens, path, judge_scores=scores)


class Page(HTMLParser):
    """What a page consists of: elements, their ids, and the text of each script."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.scripts, self.attributes = [], [], [], []
        self._in_script = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        self._in_script = tag == "script"
        if self._in_script:
            self.scripts.append("")

    def handle_data(self, data):
        if self._in_script:
            self.scripts[-1] += data

    def handle_endtag(self, tag):
        self._in_script = False

    @property
    def data(self):
        return json.loads(self.scripts[1])


# --- numbers --------------------------------------------------------------------------------------


def test_numbers_are_those_of_encode_layers(page, model, sae, tokens, streams, acts):
    data = Page(page.read_text(encoding="utf-8")).data
    values, counted = acts
    with torch.no_grad():
        routing = sae.route(streams)
    layer = routing.layer.flatten().numpy()

    maxima = values.max(0)
    assert [f["feature"] for f in data["features"]] == np.argsort(-maxima, kind="stable")[
        :32
    ].tolist()
    assert data["n_tokens"] == counted.sum() and data["n_sequences"] == len(tokens)
    shares = [float((layer[counted] == i).mean()) for i in range(len(BLOCKS))]
    assert data["share"] == pytest.approx(shares, abs=1e-5)
    assert min(shares) > 0, "the test wants every block chosen"
    probs = routing.probs.flatten(0, 1)[torch.from_numpy(counted)].mean(0)
    assert data["mean_probs"] == pytest.approx(probs.tolist(), abs=1e-5)
    assert data["blocks"] == BLOCKS

    for f in data["features"]:
        mine = values[:, f["feature"]]
        fires = mine > 0
        assert f["max_activation"] == pytest.approx(mine.max(), rel=1e-5)
        assert f["n_fired"] == fires.sum()
        assert f["density"] == pytest.approx(fires.sum() / counted.sum(), rel=1e-5)
        # the histogram by hand, counted from the edges of its bins
        edges = np.linspace(0, f["max_activation"], N_BINS + 1)
        expected = [int(((mine > a) & (mine <= b)).sum()) for a, b in pairwise(edges)]
        assert sum(f["histogram"]) == fires.sum()
        assert np.abs(np.array(f["histogram"]) - expected).sum() <= 2  # at an edge, by rounding
        assert f["layer_counts"] == [int((fires & (layer == i)).sum()) for i in range(len(BLOCKS))]
        assert f["mean_layer"] == pytest.approx(layer[fires].mean(), rel=1e-5)
        for i, points in enumerate(f["violin"]):
            here = mine[fires & (layer == i)]
            assert len(points) == min(len(here), VIOLIN_POINTS)
            if len(here):
                assert (points[0], points[-1]) == pytest.approx((here.min(), here.max()), rel=1e-5)


def test_contexts_show_the_tokens_around_the_strongest_places(
    page, model, tokens, acts, sae, streams
):
    data = Page(page.read_text(encoding="utf-8")).data
    values = acts[0].reshape(*tokens.shape, -1)
    counted = acts[1].reshape(tokens.shape)
    with torch.no_grad():
        routing = sae.route(streams)
    for f in data["features"]:
        mine = values[..., f["feature"]]
        assert 1 <= len(f["contexts"]) <= N_CONTEXTS
        best = f["contexts"][0]
        assert mine[best["sequence"], best["position"]] == pytest.approx(mine.max(), rel=1e-5)
        assert [c["acts"][c["at"]] for c in f["contexts"]] == sorted(
            (c["acts"][c["at"]] for c in f["contexts"]), reverse=True
        )
        for c in f["contexts"]:
            first = c["position"] - c["at"]
            row, span = c["sequence"], slice(first, first + len(c["tokens"]))
            assert len(c["tokens"]) <= CONTEXT_TOKENS
            assert c["acts"] == pytest.approx(mine[row, span].tolist(), rel=1e-5)
            layer = np.where(counted[row, span], routing.layer[row, span].numpy(), -1)
            assert c["layer"] == layer.tolist()
            assert c["weight"] == pytest.approx(routing.weight[row, span].tolist(), abs=6e-4)
            shown = "".join(data["words"][i] for i in c["tokens"])
            assert (
                shown
                == model.tokenizer.decode(tokens[row, span], clean_up_tokenization_spaces=False)
                or "\ufffd" in shown
            )


def test_profile_is_the_one_features_py_gives(page, model, sae, tokens, streams):
    data = Page(page.read_text(encoding="utf-8")).data
    table = find_contexts(sae, [ActivationBatch(tokens, streams)], model.tokenizer)
    for f in data["features"]:
        profile = table.profile(f["feature"])
        assert f["layer_counts"] == profile.layer_counts
        assert f["density"] == pytest.approx(profile.density, rel=1e-5)
        assert f["mean_layer"] == pytest.approx(profile.mean_layer, rel=1e-5)
        assert f["max_activation"] == pytest.approx(profile.max_activation, rel=1e-6)


def test_route_heatmap_and_texts_show_the_router(model, sae):
    text = "The cat sat on the mat < and went home."
    figure = route_heatmap(model, sae, text)
    ids = model.to_tokens(text)
    with torch.no_grad():
        _, cache = model.run_with_cache(ids)
        routing = sae.route(torch.stack([cache[f"blocks.{i}.hook_resid_post"] for i in BLOCKS], 2))
    z = np.array(figure.data[0].z)
    assert z == pytest.approx(routing.probs[0].T.numpy(), abs=1e-4)
    assert list(figure.data[1].y) == [str(BLOCKS[i]) for i in routing.layer[0].tolist()]
    data = dashboard_data(model, sae, ids, texts=[text], n_features=1)
    assert data["texts"][0]["layer"] == routing.layer[0].tolist()
    assert np.array_equal(np.array(data["texts"][0]["probs"]).T, z)


def test_a_store_and_its_tokens_give_the_same_page(model, sae):
    dataset = tokens_dataset(6, 48)
    store = RoutedActivationsStore.from_sae(model, sae, dataset, store_batch_size_prompts=4)
    from_store = dashboard_data(model, sae, store, max_tokens=6 * 48, n_features=4)
    # unlike a store, a tensor can hold sequences that end in padding, so both start from one
    again = RoutedActivationsStore.from_sae(model, sae, dataset, store_batch_size_prompts=4)
    tokens = torch.cat(list(again.token_batches(6 * 48)))
    assert from_store == dashboard_data(model, sae, tokens, n_features=4)


@pytest.mark.parametrize("model_class", ["TransformerBridge", "AutoModelForCausalLM"])
def test_other_kinds_of_model(model, sae, tokens, model_class):
    if model_class == "TransformerBridge" and not has_transformer_bridge():
        pytest.skip("this transformer-lens has no TransformerBridge")
    text = "The cat sat on the mat."
    expected = dashboard_data(model, sae, tokens[:4], n_features=5, texts=[text])
    other = load_model(TINYLLAMA, model_class)
    its_sae = routed_sae(other)
    its_sae.load_state_dict(sae.state_dict())
    data = dashboard_data(other, its_sae, tokens[:4], n_features=5, texts=[text])
    assert data["blocks"] == BLOCKS and data["hook_names"] != expected["hook_names"]
    assert data["share"] == expected["share"]
    assert data["texts"][0]["layer"] == expected["texts"][0]["layer"]
    for mine, theirs in zip(data["features"], expected["features"], strict=True):
        assert mine["feature"] == theirs["feature"]
        assert mine["max_activation"] == pytest.approx(theirs["max_activation"], rel=1e-4)


@pytest.mark.parametrize("routing", ["soft", "uniform"])
def test_other_routings(model, tokens, routing):
    data = dashboard_data(model, routed_sae(model, routing), tokens[:4], n_features=3)
    assert len(data["features"]) == 3 and data["routing"] == routing
    assert sum(data["share"]) == pytest.approx(1, abs=1e-4)


def test_selection_order_dead_features_and_what_is_refused(model, sae, tokens):
    dead = routed_sae(model)
    dead.b_enc.data[5] = -1e6
    data = dashboard_data(model, dead, tokens[:4], features=[9, 5, 9, 2], judge_scores={9: 2})
    assert [f["feature"] for f in data["features"]] == [9, 5, 2]
    assert [f["score"] for f in data["features"]] == [2, None, None]
    silent = data["features"][1]
    assert (silent["n_fired"], silent["mean_layer"], silent["contexts"]) == (0, None, [])
    json.dumps(data, allow_nan=False)
    with pytest.raises(ValueError, match="features 0 to 95"):
        dashboard_data(model, sae, tokens, features=[96])
    with pytest.raises(ValueError, match="at least one"):
        dashboard_data(model, sae, tokens, features=[])
    with pytest.raises(ValueError, match="no tokens to show"):
        dashboard_data(model, sae, torch.zeros(2, 5, dtype=torch.long))


def test_sae_dashboard_says_how_to_install_it(model, sae, tokens, monkeypatch):
    for name in ("sae_dashboard", "sae_dashboard.data_writing_fns"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=re.escape("pip install 'sae-lens-route[dashboard]'")):
        sae_dashboard_data(model, sae, tokens)


def test_plain_sae_encodes_as_the_routed_one_and_shares_nothing(sae):
    x = torch.randn(7, TINYLLAMA_WIDTH)
    plain = plain_sae(sae)
    assert plain.cfg.architecture() == "topk"
    assert torch.equal(plain.encode(x), sae.encode(x))
    before = sae.W_dec.detach().clone()
    plain.W_dec.data.zero_()
    plain.cfg.metadata.hook_names.append("x")
    assert torch.equal(sae.W_dec, before) and len(sae.cfg.metadata.hook_names) == len(BLOCKS)


# --- the file -------------------------------------------------------------------------------------


def test_page_is_one_file_that_asks_for_nothing(page):
    text = page.read_text(encoding="utf-8")
    assert page.stat().st_size < 15e6
    parsed = Page(text)
    assert re.search(r"<head>\s*<meta charset=\"utf-8\">", text[:200])
    assert len(parsed.scripts) == 3
    assert not [a for tag, a in parsed.attributes if "src" in a or tag == "link"]
    policy = [a["content"] for _, a in parsed.attributes if "http-equiv" in a]
    assert "default-src 'none'" in policy[0]
    panels = ["histogram", "layers", "violin", "contexts", "heatmap", "shares"]
    for needed in ["search", "index", "selector", *panels]:
        assert parsed.ids.count(needed) == 1
    # beside plotly, a page of 32 features is small
    assert len(text) - len(parsed.scripts[0]) < 2e6


def test_hostile_text_stays_text(page):
    parsed = Page(page.read_text(encoding="utf-8"))
    assert parsed.data["features"][0]["explanation"] == HOSTILE
    data = {**parsed.data, "model": HOSTILE, "words": [HOSTILE for _ in parsed.data["words"]]}
    again = Page(dashboard_html(data))
    assert len(again.scripts) == 3 and again.tags == parsed.tags
    assert again.data == data


# --- in a browser ---------------------------------------------------------------------------------

CHROMIUM = next(
    (p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None
)
BROWSER_OPTIONS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    # a proxy that does not exist: whatever a page asks for fails
    "--proxy-server=127.0.0.1:9",
    *("--enable-logging=stderr", "--v=0", "--virtual-time-budget=20000"),
    *("--window-size=1400,1200", "--dump-dom"),
]
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium to open the page with")


def open_page(url, profile):
    """The document after its scripts ran, and what the browser's console said; no network."""
    profile.mkdir()
    done = subprocess.run(
        [CHROMIUM, *BROWSER_OPTIONS, f"--user-data-dir={profile}", url],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=180,
        env={**os.environ, "HOME": str(profile)},
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, console


def count_classes(dom):
    names = Counter()
    for _, attributes in Page(dom).attributes:
        names.update((attributes.get("class") or "").split())
    return names


@in_browser
def test_a_browser_draws_the_selected_feature(page, tmp_path):
    data = Page(page.read_text(encoding="utf-8")).data
    selected = data["features"][5]
    dom, console = open_page(f"{page.as_uri()}#feature={selected['feature']}", tmp_path / "profile")
    root = Page(dom).attributes[0][1]
    assert console == [] and "data-error" not in root
    assert root["data-ready"] == "yes"
    assert root["data-feature"] == str(selected["feature"])
    # strips: one per context, a span per token, the colours where it fires
    names = count_classes(dom)
    assert names["strip"] == len(selected["contexts"])
    assert names["token"] == sum(len(c["tokens"]) for c in selected["contexts"])
    shown = [float(v) for v in re.findall(r'data-act="([^"]+)"', dom)]
    assert shown == [act for c in selected["contexts"] for act in c["acts"]]
    assert names["top"] == len(selected["contexts"])
    best = selected["contexts"][0]
    layer, weight = best["layer"][best["at"]], best["weight"][best["at"]]
    assert f"block {BLOCKS[layer]}, route weight {weight:g}" in dom  # on hover
    # plots: bars of three, violins, the heat map and its marks
    assert names["js-plotly-plot"] == 5
    assert names["heatmaplayer"] >= 1 and re.search(r'class="hm"', dom)
    assert names["violin"] >= sum(bool(v) for v in selected["violin"])
    assert names["point"] >= N_BINS + 2 * len(BLOCKS)
    rows = re.findall(r'<tr data-feature="(\d+)"( class="selected")?', dom)
    assert [int(n) for n, _ in rows] == [f["feature"] for f in data["features"]]
    assert [int(n) for n, mark in rows if mark] == [selected["feature"]]


@in_browser
def test_a_browser_shows_hostile_text_and_moves_between_features(page, tmp_path):
    parsed = Page(page.read_text(encoding="utf-8"))
    data = {**parsed.data, "model": HOSTILE, "words": [HOSTILE for _ in parsed.data["words"]]}
    # a user who searches, sorts and steps on, at the end of the page
    last = data["features"][-1]["feature"]
    user = f"""<script>setTimeout(() => {{
        $("index").tHead.rows[0].cells[0].click();
        document.documentElement.dataset.sorted =
            [...$("index").tBodies[0].rows].map(row => row.dataset.feature).join();
        $("search").value = "{last}"; $("search").oninput();
        document.documentElement.dataset.found = $("index").tBodies[0].rows.length;
        $("selector").value = "{last}"; $("selector").onchange();
    }}, 500)</script></body>"""
    hostile = tmp_path / "hostile.html"
    hostile.write_text(dashboard_html(data).replace("</body>", user), encoding="utf-8")
    dom, console = open_page(hostile.as_uri(), tmp_path / "profile")
    root = Page(dom).attributes[0][1]
    assert console == [] and "data-error" not in root and root["data-ready"] == "yes"
    assert "broken" not in re.search(r"<title>.*?</title>", dom)[0]
    features = [f["feature"] for f in data["features"]]
    assert root["data-sorted"] == ",".join(map(str, sorted(features)))
    assert int(root["data-found"]) >= 1
    assert root["data-feature"] == str(last)
    # every token of its strips is the text, not what the text spells
    names = count_classes(dom)
    assert dom.count(f">{escape(HOSTILE, quote=False)}</span>") == names["token"] > 0
