"""The file: one, whole, and safe with whatever text is in it."""

import re

from support.pages import HOSTILE, Page

from sae_lens_route.dashboards.page import page_html


def test_page_is_one_file_that_asks_for_nothing(page):
    text = page.read_text(encoding="utf-8")
    assert page.stat().st_size < 15e6
    parsed = Page(text)
    assert re.search(r"<head>\s*<meta charset=\"utf-8\">", text[:200])
    assert len(parsed.scripts) == 3
    assert not [a for tag, a in parsed.attributes if "src" in a or tag == "link"]
    policy = [a["content"] for _, a in parsed.attributes if "http-equiv" in a]
    assert "default-src 'none'" in policy[0]
    panels = ["histogram", "blocks", "violin", "contexts", "heatmap", "shares"]
    for needed in ["search", "index", "selector", *panels]:
        assert parsed.ids.count(needed) == 1
    # without plotly, a page of 32 features is small
    assert len(text) - len(parsed.scripts[0]) < 2e6


def test_hostile_text_stays_text(page, data):
    assert data["features"][0]["explanation"] == HOSTILE
    hostile = {**data, "model": HOSTILE, "words": [HOSTILE for _ in data["words"]]}
    written = Page(page_html(hostile))
    assert len(written.scripts) == 3
    assert written.tags == Page(page.read_text(encoding="utf-8")).tags
    assert written.data == hostile
