"""Small models for steering."""

import pytest
from support.splice import route_sae
from support.steering import N_LAYERS, ROUTED


@pytest.fixture
def small(make_model):
    """`small(kind)`: a model and a RouteSAE for it, as if trained without BOS and EOS."""

    def make(kind="hooked-llama"):
        sae = route_sae(ROUTED, seed=1, k=48)
        sae.cfg.metadata.exclude_special_tokens = True
        return make_model(kind, N_LAYERS), sae

    return make
