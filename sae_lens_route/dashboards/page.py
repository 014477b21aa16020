"""A page of features in one HTML file, which opens without a network.

1. Run the model once over the text (`collect`).
2. Summarize the selected features as plain numbers (`page_data`).
3. Embed the numbers as JSON, together with plotly. The page draws a feature when it is selected;
   `page.html#feature=12` opens on feature 12.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from plotly.offline import get_plotlyjs

from sae_lens_route.dashboards.page_data import N_FEATURES, PageData, Score, page_data
from sae_lens_route.data.reading import Text
from sae_lens_route.features.table import FeatureTable
from sae_lens_route.models.kinds import LanguageModel
from sae_lens_route.saes.routed import RoutedSAEMixin
from sae_lens_route.saes.units import Units


def write_dashboard(
    model: LanguageModel,
    sae: RoutedSAEMixin,
    text: Text,
    path: str | Path,
    *,
    features: Sequence[int] | None = None,
    n_features: int = N_FEATURES,
    judge_scores: Mapping[int, Score] | None = None,
    feature_table: FeatureTable | None = None,
    texts: Sequence[str] | None = None,
    max_tokens: int = 50_000,
    units: Units = "n(x)",
) -> Path:
    """Write one self-contained page about a selection of features; returns its path.

    Args:
        model: The model `sae` was trained on, with its tokenizer.
        sae: A RouteSAE whose metadata names its source hooks.
        text: A dataset, a path for `load_text_dataset`, or token ids with one context per row.
        path: The HTML file; its folder is created if missing.
        features: The features to show, in this order; None takes the `n_features` to look at first
            (`features/selection.py`; of the interpretable ones, if there is a feature table).
        n_features: How many to take when `features` is None.
        judge_scores: Feature -> score, shown in the index.
        feature_table: Table whose contexts are shown; features without contexts in the table show
            their strongest contexts in `text`.
        texts: Texts to show the routing of; None shows the first contexts of `text`.
        max_tokens: Tokens to read of `text`; token ids are read whole.
        units: Of the activations (`saes/units.py`).

    Raises:
        UserError: a feature that the SAE does not have, a feature table of another SAE or in other
            units, no tokens, or a model without a tokenizer.
    """
    data = page_data(
        model,
        sae,
        text,
        features=features,
        n_features=n_features,
        judge_scores=judge_scores,
        feature_table=feature_table,
        texts=texts,
        max_tokens=max_tokens,
        units=units,
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page_html(data), encoding="utf-8")
    return path


def page_html(data: PageData) -> str:
    """The page around the numbers of `page_data`.

    Its content security policy forbids every connection, so a page that works needs no network.
    Text of the data reaches the document as text only: `<` is escaped in the JSON.
    """
    content = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    parts = {
        "TITLE": escape(f"RouteSAE features: {data['model']}"),
        "STYLE": asset("style.css"),
        "PLOTLY": get_plotlyjs(),
        "DATA": content,
        "SCRIPT": asset("script.js"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], asset("page.html"))


def asset(name: str) -> str:
    """One of the files that pages are assembled from."""
    return (files("sae_lens_route.dashboards") / "assets" / name).read_text(encoding="utf-8")
