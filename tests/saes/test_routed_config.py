"""Options that cannot be used are refused, and named."""

import pytest
from support.architectures import training_config


def test_gated_has_no_latent_bias_to_hold():
    with pytest.raises(ValueError, match="latent_bias=False: route_gated has no b_enc"):
        training_config("gated", d_in=8, d_sae=16, latent_bias=False)


@pytest.mark.parametrize("architecture", ["topk", "standard"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router_objective": "assignment", "routing": "soft"}, r"router_objective='assignment'.*"),
        ({"router_objective": "assignment", "routing": "uniform"}, r"routing='uniform'"),
        ({"router_objective": "teacher"}, r"router_objective='teacher'.*'assignment'"),
        ({"loss": "l2"}, r"loss='l2'.*'normalized_mse'"),
        ({"routing": "both"}, r"routing='both'.*'hard'"),
        ({"aggregation": "max"}, r"aggregation='max'.*'sum'"),
        ({"decoder_norm_interval": -1}, r"decoder_norm_interval=-1"),
        ({"n_routed_layers": 0}, r"n_routed_layers=0"),
        ({"normalize_activations": "layer_norm"}, r"normalize_activations='layer_norm'"),
        ({"route_shares": [0.5, 0.25, 0.25]}, r"route_shares=\[0.5, 0.25, 0.25\].*'hard'"),
    ],
)
def test_options_that_do_not_go_together_are_named(architecture, changes, message):
    with pytest.raises(ValueError, match=message):
        training_config(architecture, **{"d_in": 8, "d_sae": 16, "n_routed_layers": 3, **changes})


@pytest.mark.parametrize("k", [0, 17])
def test_k_is_checked_where_there_is_one(k):
    for architecture in ("topk", "batchtopk", "matryoshka_batchtopk"):
        with pytest.raises(ValueError, match=f"k={k}: must be between 1 and d_sae=16"):
            training_config(architecture, d_in=8, d_sae=16, k=k)
