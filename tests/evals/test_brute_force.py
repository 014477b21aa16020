"""Every reported number of an evaluation, against `support/brute_force.py`, in float64.

The model is a small random Llama with sharp predictions, and its text is what it samples itself: so
ablation costs something, and loss recovered is a number. Some tokens are excluded by their id and
some by their position, some features are dead, ReLU switches some of the k off.
"""

from functools import cache

import numpy as np
import pytest
import torch
from support import brute_force
from support.brute_force import TOLERANCE, Scene
from support.crosscoders import crosscoder
from support.numbers import assert_close
from support.splice import D, hooked_model, route_sae

from sae_lens_route.evals.downstream import DownstreamSums, downstream_metrics
from sae_lens_route.evals.evaluate import evaluate
from sae_lens_route.evals.reconstruction import reconstruction_metrics
from sae_lens_route.saes.routed import uniform_draws, with_routes

pytestmark = pytest.mark.usefixtures("no_gradients")

BLOCKS = [2, 4, 5]
BOS, PADDING = 0, 1
N_ROWS, N_POSITIONS, BATCH_SIZE = 4, 9, 3
POSITIONS = (None, 8)
"""The last position is excluded."""

CASES = {
    "hard": {},
    "mean": {"aggregation": "mean"},
    "one block": {"blocks": [4]},
    "uniform": {"routing": "uniform", "routing_seed": 3},
    "a block without tokens": {"routing": "uniform", "route_shares": [0.75, 0.0, 0.25]},
}


@cache
def model():
    model = hooked_model("llama", n_layers=7)
    model.W_U.data *= 4
    return model


@cache
def tokens():
    """BOS, then what the model samples; one row ends in padding."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.zeros(N_ROWS, 1, dtype=torch.long)
    while rows.shape[1] < N_POSITIONS:
        probs = model()(rows)[:, -1, 2:].softmax(-1)
        rows = torch.cat([rows, 2 + probs.multinomial(1, generator=generator)], dim=1)
    rows[1, -3:] = PADDING
    return rows


def kept_tokens():
    return [
        (row, position)
        for row, position in np.ndindex(N_ROWS, N_POSITIONS)
        if tokens()[row, position] not in (BOS, PADDING) and position < 8
    ]


def described(sae):
    metadata = sae.cfg.metadata
    metadata.routed_blocks = [int(name.split(".")[1]) for name in metadata.hook_names]
    metadata.exclude_special_tokens, metadata.seqpos_slice = [BOS, PADDING], POSITIONS
    return sae


def sae_of(case, **options):
    options = {**CASES.get(case, {}), **options}
    blocks = options.pop("blocks", BLOCKS)
    sae = route_sae(blocks, k=80, **options)
    sae.b_enc[::9] = -100
    return described(sae)


def drawn(sae):
    """The routes of every token: one draw per batch, from the seed on."""
    if getattr(sae.cfg, "routing", None) != "uniform":
        return None
    generator = torch.Generator().manual_seed(sae.cfg.routing_seed)
    routes = []
    for batch in tokens().split(BATCH_SIZE):
        if sae.cfg.route_shares is None:
            one = torch.randint(sae.cfg.n_routed_layers, batch.shape, generator=generator)
        else:
            shares = torch.tensor(sae.cfg.route_shares)
            one = torch.multinomial(shares, batch.numel(), True, generator=generator)
        routes.append(one.view(batch.shape))
    return torch.cat(routes).numpy()


def scene_of(sae):
    blocks = sae.cfg.metadata.routed_blocks
    return Scene(model(), sae, blocks, tokens(), kept_tokens(), drawn(sae))


def evaluated(sae):
    return evaluate(model(), sae, tokens(), batch_size=BATCH_SIZE)


@pytest.mark.parametrize("case", CASES)
def test_reconstruction(case):
    sae = sae_of(case)
    expected = brute_force.reconstruction(scene_of(sae))
    assert_close(evaluated(sae).reconstruction._asdict(), expected, TOLERANCE)
    assert 0 < expected["dead_features"] < 128 and expected["l0"] < 80
    assert (0.0 in expected["share_by_block"].values()) == (case == "a block without tokens")


def test_reconstruction_of_a_mixture():
    sae = sae_of("soft", routing="soft")
    result = evaluated(sae)
    expected = brute_force.reconstruction(scene_of(sae))
    assert_close(result.reconstruction._asdict(), expected, TOLERANCE)
    assert result.downstream is result.downstream_unscaled is expected["regret"] is None


@pytest.mark.parametrize("case", CASES)
def test_downstream(case):
    sae = sae_of(case)
    scene, result = scene_of(sae), evaluated(sae)
    for unscaled, found in ((False, result.downstream), (True, result.downstream_unscaled)):
        expected = brute_force.downstream(scene, unscaled)
        assert_close(found._asdict(), expected, TOLERANCE)
        assert expected["loss_recovered"] is not None
    if case in ("hard", "mean"):  # both happen: some tokens would be routed elsewhere, some not
        assert 0.1 < expected["route_agreement"] < 0.9


def test_a_crosscoder():
    sae = described(
        crosscoder(
            "topk",
            width=D,
            d_sae=128,
            k=80,
            metadata=type(sae_of("hard").cfg.metadata)(
                hook_name="blocks.5.stack.hook_resid_post",
                hook_names=[f"blocks.{block}.hook_resid_post" for block in BLOCKS],
            ),
        )
    )
    sae.b_enc.data[::9] = -100
    result = evaluated(sae)
    expected = brute_force.crosscoder_reconstruction(scene_of(sae))
    assert_close(result.reconstruction._asdict(), expected, TOLERANCE)
    expected = brute_force.crosscoder_downstream(scene_of(sae))
    assert_close(result.downstream._asdict(), expected, TOLERANCE)
    assert result.downstream_unscaled is None and expected["loss_recovered"] is not None


# --- the null rule of loss recovered --------------------------------------------------------------


@pytest.mark.parametrize(
    ("cost", "recovered"), [(0.5, 0.75), (0.0501, 1 - 0.125 / 0.0501), (0.0499, None), (-1.0, None)]
)
def test_loss_recovered_is_null_where_ablation_costs_little(cost, recovered):
    sums = DownstreamSums(model(), sae_of("hard"), unscaled=False)
    values = {"ce_clean": 2.0, "ce_spliced": 2.125, "ce_ablated": 2.0 + cost, "targets": 1.0}
    values |= {"tokens": 1.0, "kl": 0.25, "kl_ablated": 0.5}
    by_block = {"kl_by_block": [0.25, 0.0, 0.0], "tokens_by_block": [1.0, 0.0, 0.0]}
    sums.totals.add(
        **{name: torch.tensor(v, dtype=torch.float64) for name, v in (values | by_block).items()}
    )
    # the costs are 3e-16 off after the addition of 2, relative to .05
    assert sums.metrics().loss_recovered == (
        None if recovered is None else pytest.approx(recovered, rel=TOLERANCE)
    )


# --- one draw of uniform routing for an evaluation ------------------------------------------------


def test_scaled_and_unscaled_splices_of_a_uniform_router_are_equal():
    """p is 1, so the two conventions are the same computation, if the routes are the same."""
    result = evaluated(sae_of("uniform"))
    assert result.downstream == result.downstream_unscaled
    assert result.downstream.route_agreement == 1


def test_an_evaluation_of_a_uniform_router_is_repeated_bit_for_bit():
    """Also after other uses of the SAE, which draw from a generator of their own."""
    sae = sae_of("uniform")
    first = evaluated(sae)
    streams = torch.randn(5, 3, D, dtype=torch.float64)
    assert not torch.equal(sae.route(streams).route, sae.route(streams).route)
    assert evaluated(sae) == first


def test_an_evaluation_leaves_the_draws_of_training_where_they_were():
    used, unused = sae_of("uniform"), sae_of("uniform")
    evaluated(used)
    streams = torch.randn(50, 3, D, dtype=torch.float64)
    assert torch.equal(used.route(streams).route, unused.route(streams).route)


def test_kl_by_block_and_shares_are_those_of_one_draw():
    sae = sae_of("uniform")
    result = evaluated(sae)
    shares, kl_by_block = result.reconstruction.share_by_block, result.downstream.kl_by_block
    total = sum(share * kl_by_block[block] for block, share in shares.items())
    assert total == pytest.approx(result.downstream.kl, rel=TOLERANCE)


def test_a_splice_alone_draws_once_too():
    sae = sae_of("uniform")
    kept = torch.zeros_like(tokens(), dtype=torch.bool)
    kept[tuple(torch.tensor(kept_tokens()).T)] = True
    batches = list(zip(tokens().split(BATCH_SIZE), kept.split(BATCH_SIZE), strict=True))
    alone = downstream_metrics(model(), sae, batches)
    assert alone == evaluated(sae).downstream


def test_given_routes_are_taken_and_must_fit():
    sae = sae_of("uniform")
    x = torch.randn(2, 3, D, dtype=torch.float64)
    with with_routes(sae, torch.tensor([2, 0])):
        assert sae.route(x).route.tolist() == [2, 0]
        with pytest.raises(ValueError, match=r"routes of shape \[2\] for tokens of shape \[2, 1\]"):
            sae.route(x.unsqueeze(1))
    with with_routes(sae, torch.tensor([1, 1])):
        assert reconstruction_metrics(sae, [x]).share_by_block == {2: 0, 4: 1, 5: 0}


def test_only_uniform_routing_draws():
    shape = torch.Size([2, 3])
    assert uniform_draws(sae_of("hard"))(shape) is None
    assert uniform_draws(crosscoder())(shape) is None
    draws = uniform_draws(sae_of("uniform"))
    first, second = draws(shape), draws(shape)
    assert first.shape == shape and not torch.equal(first, second)
    with with_routes(sae_of("hard"), first):  # no effect on a router that chooses
        pass
