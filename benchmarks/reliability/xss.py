"""Texts that would run a script, through every page, in a browser that a user moves about in.

`tests/support/xss.py` holds the texts. They come in as token texts of a tokenizer, explanations of
a judge, the model's name, labels of runs, and in place of every other text in a page's data. In the
browser everything is hovered over, focused, clicked and selected. No text may run, and none may
become an element. As a control the texts are also put into a page as they are.

    tokens      `write_dashboard` with a vocabulary, a judge and a model name of these texts
    data        the same page with every text of its data replaced, each text in each place
    labels      the figures as they are drawn with labels and axis titles of these texts
    SVG         the same figures for documents
    figures     a figure with every kind of trace and every text of it replaced, each in each place
    SAEDashboard  its page of the same model (where the extra `dashboard` is installed)

    python benchmarks/reliability/xss.py
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from support.pages import CHROMIUM, Page, routed_sae  # noqa: E402
from support.xss import (  # noqa: E402
    CORPUS,
    every_token,
    hostile_answers,
    hostile_tokenizer_folder,
    opened_alone,
    opened_by_a_user,
    texts_that_run,
    with_hostile_texts,
)

from sae_lens_route.dashboards import write_dashboard  # noqa: E402
from sae_lens_route.dashboards.page import page_html  # noqa: E402
from sae_lens_route.models.load import load_model  # noqa: E402
from sae_lens_route.plots import (  # noqa: E402
    ThresholdCurve,
    TradeoffPoint,
    routing_shares,
    threshold_curves,
    tradeoff,
    write_figure,
)

RESULTS = ROOT / "benchmarks" / "results" / "reliability" / "xss.json"


def dashboard_pages(model: Any, folder: Path, n: int) -> Iterator[tuple[str, Path]]:
    """The page made of the hostile model, and the same page with other texts in its data."""
    sae = routed_sae(model)
    for name, text in (("model_name", CORPUS[1]), ("model_class_name", CORPUS[10])):
        setattr(sae.cfg.metadata, name, text)
    answers = hostile_answers(list(range(sae.cfg.d_sae)))
    path = folder / "tokens.html"
    features = list(range(sae.cfg.d_sae))
    yield (
        "tokens",
        write_dashboard(model, sae, every_token(), path, features=features, judge_scores=answers),
    )
    data = Page(path.read_text(encoding="utf-8")).data
    data["features"] = data["features"][:3]
    for i in range(n):
        texts = itertools.cycle(CORPUS[i:] + CORPUS[:i])
        page = folder / f"data-{i}.html"
        page.write_text(
            page_html(with_hostile_texts(data, lambda texts=texts: next(texts))), encoding="utf-8"
        )
        yield "data", page


def label_pages(folder: Path) -> Iterator[tuple[str, Path]]:
    """Figures whose labels and axis titles are the texts, ten at a time."""
    for i in range(0, len(CORPUS), 10):
        labels = CORPUS[i : i + 10]
        figures = {
            "tradeoff": tradeoff(
                [TradeoffPoint(each, (8,), 8.0, 0.5) for each in labels], labels[0]
            ),
            "shares": routing_shares({each: [{3: 0.5, 5: 0.5}] for each in labels}),
            "thresholds": threshold_curves(
                [ThresholdCurve(each, [0.1, 0.2], [3, 2]) for each in labels], labels[0]
            ),
        }
        for name, figure in figures.items():
            html, svg = write_figure(figure, folder / f"{name}-{i}")
            yield "labels", html
            yield "SVG", svg


def figure_pages(folder: Path, n: int) -> Iterator[tuple[str, Path]]:
    """A figure of bars and lines with the texts in every place that has one."""
    points = [TradeoffPoint(str(i), (8,), 8.0, 0.5) for i in range(3)]
    figure = tradeoff(points, "y").add_traces(routing_shares({"a": [{3: 0.5, 5: 0.5}]}).data)
    for i in range(n):
        texts = itertools.cycle(CORPUS[i:] + CORPUS[:i])
        categories = [next(texts), next(texts)]
        for trace in figure.data:
            trace.update(name=next(texts), text=[next(texts)], hovertext=[next(texts)])
            trace.x = categories[: len(trace.x)]
        figure.update_layout(
            title=next(texts),
            xaxis={"title": next(texts), "type": "category"},
            yaxis_title=next(texts),
            legend_title=next(texts),
            showlegend=True,
        )
        yield "figures", write_figure(figure, folder / f"figure-{i}")[0]


def sae_dashboard_page(model: Any, folder: Path) -> Iterator[tuple[str, Path]]:
    """SAEDashboard's page of the hostile model."""
    from sae_lens_route.dashboards.sae_dashboard import sae_dashboard_pages

    yield (
        "SAEDashboard",
        sae_dashboard_pages(
            model, routed_sae(model), every_token(), folder / "sae_dashboard.html", n_features=24
        ),
    )


def main() -> None:
    """Open every page, print and write what became of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=len(CORPUS), help="pages with replaced texts")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if CHROMIUM is None:
        raise SystemExit("no chromium to open pages with")
    torch.manual_seed(0)
    pages: dict[str, int] = {}
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        live = texts_that_run(folder)
        model = load_model(str(hostile_tokenizer_folder(folder / "model")))
        sources = [
            dashboard_pages(model, folder, arguments.n),
            label_pages(folder),
            figure_pages(folder, arguments.n),
        ]
        if find_spec("sae_dashboard") is not None:
            sources.append(sae_dashboard_page(model, folder))
        for i, (kind, page) in enumerate(itertools.chain(*sources)):
            open_ = opened_alone if page.suffix == ".svg" else opened_by_a_user
            opened = open_(page, folder / f"profile-{i}")
            pages[kind] = pages.get(kind, 0) + 1
            if opened.ran is not None:
                failures.append(f"{page.name}: text {opened.ran} ran: {CORPUS[int(opened.ran)]}")
            if opened.elements or not opened.touched:
                failures.append(f"{page.name}: {sorted(opened.elements)}, {opened.console[:2]}")
    browser = subprocess.run([CHROMIUM, "--version"], capture_output=True, text=True, check=True)
    content = {
        "command": f"python benchmarks/reliability/xss.py --n {arguments.n}",
        "versions": {
            **{name: version(name) for name in ("plotly", "transformers", "transformer-lens")},
            "browser": browser.stdout.strip(),
        },
        "texts": len(CORPUS),
        "texts_that_run_unescaped": live,
        "pages": pages,
        "failures": failures,
    }
    print(*(f"{kind:13} {n} pages" for kind, n in pages.items()), sep="\n")
    print(
        f"{len(CORPUS)} texts ({live} run by themselves unescaped), {len(failures)} failures",
        *failures[:20],
        sep="\n",
    )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(content, indent=1) + "\n")
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
