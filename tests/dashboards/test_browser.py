"""Pages opened in a browser that has no network."""

import re
from html import escape

import numpy as np
from support.pages import HOSTILE, Page, in_browser, open_page, routed_sae

from sae_lens_route.dashboards import write_dashboard
from sae_lens_route.dashboards.page import page_html
from sae_lens_route.dashboards.page_data import N_BINS
from sae_lens_route.data.reading import activation_batches
from sae_lens_route.features.contexts import find_contexts
from sae_lens_route.features.table import ContextOptions

pytestmark = in_browser


def opened(page, feature, tmp_path):
    """The drawn page at one of its features; no errors."""
    dom, console = open_page(f"{page.as_uri()}#feature={feature}", tmp_path / "profile")
    root = Page(dom).root
    assert console == [] and "data-error" not in root
    assert (root["data-ready"], root["data-feature"]) == ("yes", str(feature))
    return dom


def test_the_selected_feature_is_drawn(page, data, tmp_path):
    selected = data["features"][5]
    dom = opened(page, selected["feature"], tmp_path)
    # strips: one per context, a span per token, colored where the feature fires
    classes = Page(dom).classes
    assert classes["strip"] == len(selected["contexts"])
    assert classes["token"] == sum(len(c["tokens"]) for c in selected["contexts"])
    shown = [float(v) for v in re.findall(r'data-act="([^"]+)"', dom)]
    assert shown == [act for c in selected["contexts"] for act in c["acts"]]
    assert classes["top"] == len(selected["contexts"])
    excluded = [block for c in selected["contexts"] for block in c["blocks"] if block is None]
    assert classes["excluded"] == dom.count("\nexcluded token") == len(excluded) > 0
    best = selected["contexts"][0]
    block, weight = best["blocks"][best["at"]], best["weights"][best["at"]]
    assert f"block {block}, route weight {weight:g}" in dom  # on hover
    # plots: bars of three, violins, the heat map and its marks
    assert classes["js-plotly-plot"] == 5
    assert classes["heatmaplayer"] >= 1 and re.search(r'class="hm"', dom)
    assert classes["violin"] >= sum(bool(v) for v in selected["activations_by_block"].values())
    assert classes["point"] >= N_BINS + 2 * len(data["blocks"])
    assert "activation, units of n(x)" in dom
    rows = re.findall(r'<tr data-feature="(\d+)"( class="selected")?', dom)
    assert [int(n) for n, _ in rows] == [f["feature"] for f in data["features"]]
    assert [int(n) for n, mark in rows if mark] == [selected["feature"]]


def test_blocks_2_5_9_are_called_2_5_9(model, tokens, tmp_path):
    sae = routed_sae(model, blocks=[2, 5, 9])
    (batch, *_) = activation_batches(model, sae, tokens, batch_size=len(tokens))
    routing = sae.route(batch.activations)
    acts = sae.encode(routing.x_route).detach() / routing.weight[..., None] * batch.kept[..., None]
    at_9 = acts.masked_fill(routing.route[..., None] != 2, 0)
    feature = int(at_9.amax((0, 1)).argmax())  # with its strongest activation at block 9
    page = write_dashboard(model, sae, tokens, tmp_path / "page.html", features=[feature])

    (entry,) = Page(page.read_text(encoding="utf-8")).data["features"]
    fired = acts[..., feature] > 0
    counts = {b: int((fired & (routing.route == r)).sum()) for r, b in enumerate([2, 5, 9])}
    assert entry["n_fired_by_block"] == {str(b): n for b, n in counts.items()}
    mean_block = np.average([2, 5, 9], weights=list(counts.values()))
    assert abs(entry["mean_block"] - mean_block) < 1e-4
    best = entry["contexts"][0]
    assert best["blocks"][best["at"]] == 9

    dom = opened(page, feature, tmp_path)
    plot = dom[dom.index('id="blocks"') : dom.index('id="violin"')]
    ticks = re.findall(r'class="xtick"><text[^>]*>([^<]*)</text>', plot)
    assert ticks == ["2", "5", "9"]
    strengths = re.findall(r'class="origin">([^<]*)<', dom)
    assert "block 9" in strengths[0]
    tooltips = {int(b) for b in re.findall(r"\nblock (\d+), route weight", dom)}
    assert 9 in tooltips <= {2, 5, 9}
    assert f"mean block {mean_block:.3}"[:13] in dom


def test_contexts_of_a_feature_table_are_shown(model, sae, tokens, tmp_path):
    batches = activation_batches(model, sae, tokens)
    table = find_contexts(sae, batches, model.tokenizer, ContextOptions(threshold=0.5))
    page = write_dashboard(
        model, sae, tokens[:2], tmp_path / "page.html", feature_table=table, n_features=2
    )
    entry = Page(page.read_text(encoding="utf-8")).data["features"][1]
    dom = opened(page, entry["feature"], tmp_path)
    classes = Page(dom).classes
    assert classes["strip"] == classes["top"] == len(entry["contexts"])
    shown = [float(v) for v in re.findall(r'data-act="([^"]+)"', dom)]
    assert shown == [c["acts"][c["at"]] for c in entry["contexts"]]
    assert "excluded" not in classes


def test_hostile_text_is_shown_and_a_user_moves_between_features(data, tmp_path):
    hostile = {**data, "model": HOSTILE, "words": [HOSTILE for _ in data["words"]]}
    # a user who sorts, searches and selects
    last = data["features"][-1]["feature"]
    user = f"""<script>setTimeout(() => {{
        $("index").tHead.rows[0].cells[0].click();
        document.documentElement.dataset.sorted =
            [...$("index").tBodies[0].rows].map(row => row.dataset.feature).join();
        $("search").value = "{last}"; $("search").oninput();
        document.documentElement.dataset.found = $("index").tBodies[0].rows.length;
        $("selector").value = "{last}"; $("selector").onchange();
    }}, 500)</script></body>"""
    page = tmp_path / "hostile.html"
    page.write_text(page_html(hostile).replace("</body>", user), encoding="utf-8")
    dom, console = open_page(page.as_uri(), tmp_path / "profile")
    root = Page(dom).root
    assert console == [] and "data-error" not in root and root["data-ready"] == "yes"
    assert "broken" not in re.search(r"<title>.*?</title>", dom)[0]
    features = [f["feature"] for f in data["features"]]
    assert root["data-sorted"] == ",".join(map(str, sorted(features)))
    assert int(root["data-found"]) >= 1
    assert root["data-feature"] == str(last)
    # every token of its strips is the text itself, not the elements that the text spells
    assert dom.count(f">{escape(HOSTILE, quote=False)}</span>") == Page(dom).classes["token"] > 0
