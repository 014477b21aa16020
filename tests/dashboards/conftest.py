"""A small RouteSAE, a text, and its activations computed without the package's reading."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from support.pages import BLOCKS, HOSTILE, Page, routed_sae
from support.small import tokens_dataset

from sae_lens_route.dashboards import write_dashboard
from sae_lens_route.dashboards.page_data import page_data
from sae_lens_route.features.judge_prompt import Answer


@pytest.fixture(scope="session")
def model(tinyllama):
    return tinyllama


@pytest.fixture(scope="session")
def sae(model):
    return routed_sae(model)


@pytest.fixture(scope="session")
def tokens():
    return torch.tensor(tokens_dataset(20, 48)["tokens"])


class Expected(NamedTuple):
    """Of every token, in the shape of the token ids."""

    acts: np.ndarray
    """Feature activations in units of n(x), 0 at excluded tokens."""
    kept: np.ndarray
    route: np.ndarray
    weight: np.ndarray
    probs: np.ndarray

    @property
    def block(self):
        return np.array(BLOCKS)[self.route]


@pytest.fixture(scope="session")
def expected(model, sae, tokens):
    """From one plain forward pass; the text's special tokens are excluded."""
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        streams = torch.stack([cache[f"blocks.{i}.hook_resid_post"] for i in BLOCKS], dim=2)
        routing = sae.route(streams)
        acts = sae.encode(routing.x_route) / routing.weight.unsqueeze(-1)
    special = torch.isin(tokens, torch.tensor(model.tokenizer.all_special_ids))
    parts = (~special, routing.route, routing.weight, routing.probs)
    return Expected(
        acts.masked_fill(special[..., None], 0).numpy(), *(part.numpy() for part in parts)
    )


@pytest.fixture(scope="session")
def page(model, sae, tokens, tmp_path_factory):
    """A written page of 32 features; a judge explained the first in hostile text."""
    path = tmp_path_factory.mktemp("page") / "new" / "features.html"
    first = [f["feature"] for f in page_data(model, sae, tokens, n_features=2)["features"]]
    scores = {first[0]: Answer("low-level", 5, HOSTILE), first[1]: 4.5}
    return write_dashboard(model, sae, tokens, path, judge_scores=scores)


@pytest.fixture(scope="session")
def data(page):
    """The numbers in that page."""
    return Page(page.read_text(encoding="utf-8")).data
