"""Maxima of features, against a plain forward pass, and against a feature table."""

import pytest
import torch
from support.pages import routed_sae
from support.small import tokens_dataset

from sae_lens_route.data.reading import activation_batches
from sae_lens_route.errors import UserError
from sae_lens_route.features.contexts import find_contexts
from sae_lens_route.features.table import ContextOptions
from sae_lens_route.steering import FeatureEdit, maxima_of_table, measured_maxima

EDITS = [FeatureEdit(7, "set", 1.5, relative=True), FeatureEdit(9, "set", 2.0)]


@pytest.fixture(scope="module")
def tokens():
    return torch.tensor(tokens_dataset(12, 48)["tokens"])


@pytest.mark.parametrize("units", ["n(x)", "x_route"])
def test_maxima_are_those_of_a_plain_forward_pass(tinyllama, tokens, units):
    sae = routed_sae(tinyllama)
    with torch.no_grad():
        _, cache = tinyllama.run_with_cache(tokens)
        routing = sae.route(torch.stack([cache[n] for n in sae.cfg.metadata.hook_names], dim=2))
        acts = sae.encode(routing.x_route)[..., 7]
    acts = acts / routing.weight if units == "n(x)" else acts
    special = torch.isin(tokens, torch.tensor(tinyllama.tokenizer.all_special_ids))
    expected = {7: pytest.approx(float(acts[~special].max()), rel=1e-5)}
    assert measured_maxima(tinyllama, sae, EDITS, tokens, units=units) == expected

    batches = activation_batches(tinyllama, sae, tokens)
    table = find_contexts(sae, batches, tinyllama.tokenizer, ContextOptions(units=units))
    assert maxima_of_table(table, sae, EDITS, units) == expected
    other = "x_route" if units == "n(x)" else "n(x)"
    with pytest.raises(UserError, match=r"feature_table is in units of .*pass units="):
        maxima_of_table(table, sae, EDITS, other)


def test_nothing_is_read_without_a_relative_edit(tinyllama):
    assert measured_maxima(tinyllama, routed_sae(tinyllama), EDITS[1]) == {}


def test_the_saes_own_dataset_is_read(tinyllama):
    sae = routed_sae(tinyllama)
    sae.cfg.metadata.dataset_path = None
    with pytest.raises(UserError, match="dataset_path=None: name a text"):
        measured_maxima(tinyllama, sae, EDITS)
    sae.cfg.metadata.dataset_path = "demo"
    own = measured_maxima(tinyllama, sae, EDITS, max_tokens=480)
    assert own == measured_maxima(tinyllama, sae, EDITS, "demo:train", max_tokens=480)
    assert own[7] > 0
    with pytest.raises(UserError, match="feature=96"):
        measured_maxima(tinyllama, sae, FeatureEdit(96, "set", 1.0, relative=True))
