"""No text of a tokenizer, a judge or a file runs in a page that a user moves about in."""

from support.pages import in_browser, routed_sae
from support.xss import (
    every_token,
    hostile_answers,
    hostile_tokenizer_folder,
    opened_by_a_user,
    texts_that_run,
)

from sae_lens_route.dashboards import write_dashboard
from sae_lens_route.models.load import load_model

pytestmark = in_browser


def test_the_texts_run_where_nothing_is_escaped(tmp_path):
    assert texts_that_run(tmp_path) >= 25


def test_none_runs_in_a_dashboard(tmp_path):
    model = load_model(str(hostile_tokenizer_folder(tmp_path / "model")))
    sae = routed_sae(model)
    sae.cfg.metadata.model_name = "</title></script><img src=x onerror=alert(1)>"
    features = list(range(sae.cfg.d_sae))
    page = write_dashboard(
        model,
        sae,
        every_token(),
        tmp_path / "page.html",
        features=features,
        judge_scores=hostile_answers(features),
    )
    opened = opened_by_a_user(page, tmp_path / "profile")
    assert opened.touched and opened.ran is None and not opened.elements
