"""The numbers of a page against a plain forward pass, and against the feature table."""

import json
from itertools import pairwise

import numpy as np
import pytest
from support.pages import BLOCKS, routed_sae
from support.selection import to_look_at_first

from sae_lens_route.dashboards.collect import N_TEXTS, route_text
from sae_lens_route.dashboards.page_data import (
    CONTEXT_TOKENS,
    N_BINS,
    N_CONTEXTS,
    VIOLIN_POINTS,
    page_data,
)
from sae_lens_route.data.reading import activation_batches
from sae_lens_route.errors import UserError
from sae_lens_route.features.contexts import find_contexts
from sae_lens_route.features.judge_prompt import Answer
from sae_lens_route.features.surface_score import surface_ranking
from sae_lens_route.features.table import ContextOptions

# --- the text and its features --------------------------------------------------------------------


def test_shares_and_probabilities_of_the_text(data, tokens, expected):
    assert data["blocks"] == BLOCKS and data["units"] == "n(x)"
    assert data["n_tokens"] == expected.kept.sum() and data["n_sequences"] == len(tokens)
    shares = {str(b): float((expected.block == b)[expected.kept].mean()) for b in BLOCKS}
    assert data["share_by_block"] == pytest.approx(shares, abs=1e-5)
    assert min(shares.values()) > 0, "the test wants every block chosen"
    probs = expected.probs[expected.kept].mean(0).tolist()
    assert data["mean_probs_by_block"] == pytest.approx(
        dict(zip(map(str, BLOCKS), probs, strict=True)), abs=1e-5
    )


def test_numbers_of_a_feature_are_those_of_its_activations(data, expected):
    order = to_look_at_first(expected.acts, expected.kept.sum())
    assert [f["feature"] for f in data["features"]] == order[:32]
    for f in data["features"]:
        mine = expected.acts[..., f["feature"]]
        fires = mine > 0
        assert f["max_activation"] == pytest.approx(mine.max(), rel=1e-5)
        assert f["n_fired"] == fires.sum()
        assert f["density"] == pytest.approx(fires.sum() / expected.kept.sum(), rel=1e-5)
        # the histogram by hand, counted from the edges of its bins
        edges = np.linspace(0, f["max_activation"], N_BINS + 1)
        counts = [int(((mine > a) & (mine <= b)).sum()) for a, b in pairwise(edges)]
        assert sum(f["histogram"]) == fires.sum()
        assert np.abs(np.array(f["histogram"]) - counts).sum() <= 2  # at an edge, by rounding
        assert f["mean_block"] == pytest.approx(expected.block[fires].mean(), rel=1e-5)
        for block in BLOCKS:
            here = mine[fires & (expected.block == block)]
            assert f["n_fired_by_block"][str(block)] == len(here)
            points = f["activations_by_block"][str(block)]
            assert len(points) == min(len(here), VIOLIN_POINTS)
            if len(here):
                assert (points[0], points[-1]) == pytest.approx((here.min(), here.max()), rel=1e-5)


def test_contexts_show_the_tokens_around_the_strongest_activations(data, model, tokens, expected):
    for f in data["features"]:
        mine = expected.acts[..., f["feature"]]
        assert 1 <= len(f["contexts"]) <= N_CONTEXTS
        best = f["contexts"][0]
        assert mine[best["sequence"], best["position"]] == pytest.approx(mine.max(), rel=1e-5)
        strengths = [c["acts"][c["at"]] for c in f["contexts"]]
        assert strengths == sorted(strengths, reverse=True)
        for c in f["contexts"]:
            first = c["position"] - c["at"]
            row, span = c["sequence"], slice(first, first + len(c["tokens"]))
            assert len(c["tokens"]) <= CONTEXT_TOKENS
            assert c["acts"] == pytest.approx(mine[row, span].tolist(), rel=1e-5)
            blocks = zip(expected.block[row, span].tolist(), expected.kept[row, span], strict=True)
            assert c["blocks"] == [block if kept else None for block, kept in blocks]
            assert c["weights"] == pytest.approx(expected.weight[row, span].tolist(), abs=6e-4)
            shown = "".join(data["words"][i] for i in c["tokens"])
            decoded = model.tokenizer.decode(tokens[row, span], clean_up_tokenization_spaces=False)
            assert shown == decoded or "\ufffd" in shown


def test_texts_show_the_router(data, model, sae, tokens, expected):
    assert len(data["texts"]) == N_TEXTS
    for row, text in enumerate(data["texts"]):
        assert text["blocks"] == expected.block[row].tolist()
        assert np.array(text["probs"]) == pytest.approx(expected.probs[row], abs=1e-4)
    sentence = "The cat sat on the mat < and went home."
    asked = page_data(model, sae, tokens[:2], texts=[sentence], n_features=1)
    routed = route_text(model, sae, sentence)
    (text,) = asked["texts"]
    assert "".join(asked["words"][i] for i in text["tokens"][1:]) == sentence
    assert text["blocks"] == [BLOCKS[i] for i in routed.route]
    assert np.array(text["probs"]) == pytest.approx(routed.probs, abs=1e-4)


@pytest.mark.parametrize("exclude_special_tokens", [False, [0, 7, 200]])
def test_excluded_tokens_alone_have_no_block(model, tokens, exclude_special_tokens):
    sae = routed_sae(model)
    sae.cfg.metadata.exclude_special_tokens = exclude_special_tokens
    sae.cfg.metadata.seqpos_slice = (0, 30)
    excluded = exclude_special_tokens or []
    data = page_data(model, sae, tokens, n_features=96)
    n_excluded = 0
    for context in (c for f in data["features"] for c in f["contexts"]):
        first, row = context["position"] - context["at"], context["sequence"]
        for i, (act, block) in enumerate(zip(context["acts"], context["blocks"], strict=True)):
            outside = first + i >= 30 or int(tokens[row, first + i]) in excluded
            assert (block is None) == outside
            assert not outside or act == 0
            n_excluded += outside
    assert n_excluded > 0


@pytest.mark.parametrize("routing", ["soft", "uniform"])
def test_other_routings(model, tokens, routing):
    data = page_data(model, routed_sae(model, routing), tokens[:4], n_features=3)
    assert len(data["features"]) == 3 and data["routing"] == routing
    assert sum(data["share_by_block"].values()) == pytest.approx(1, abs=1e-4)


def test_units_of_x_route_are_what_the_sae_encodes(model, sae, tokens, expected):
    data = page_data(model, sae, tokens, features=[9], units="x_route")
    assert data["units"] == "x_route"
    of_x_route = (expected.acts * expected.weight[..., None])[..., 9]
    (shown,) = data["features"]
    assert shown["max_activation"] == pytest.approx(of_x_route.max(), rel=1e-5)
    assert of_x_route.max() < 0.99 * expected.acts[..., 9].max()
    table = find_table(model, sae, tokens)
    with pytest.raises(UserError, match=r"feature_table is in units of n\(x\)"):
        page_data(model, sae, tokens, feature_table=table, units="x_route")


# --- selection and scores -------------------------------------------------------------------------


def test_selection_order_and_dead_features(model, tokens):
    dead = routed_sae(model)
    dead.b_enc.data[5] = -1e6
    data = page_data(model, dead, tokens[:4], features=[9, 5, 9, 2], judge_scores={9: 2})
    assert [f["feature"] for f in data["features"]] == [9, 5, 2]
    assert [f["score"] for f in data["features"]] == [2, None, None]
    silent = data["features"][1]
    assert (silent["n_fired"], silent["mean_block"], silent["contexts"]) == (0, None, [])
    json.dumps(data, allow_nan=False)


def test_scores_are_numbers_answers_or_surface_scores(model, sae, tokens):
    table = find_table(model, sae, tokens, threshold=0.5)
    surface = surface_ranking(table)[0]
    scores = {surface.feature: surface, 1: Answer("high-level", 4, "animals"), 2: 3.25}
    data = page_data(model, sae, tokens[:4], features=list(scores), judge_scores=scores)
    first, second, third = data["features"]
    assert data["score_name"] == "surface score"
    assert first["score"] == pytest.approx(surface.score, rel=1e-5)
    assert (second["score"], second["category"], second["explanation"]) == (
        4,
        "high-level",
        "animals",
    )
    assert (third["score"], third["category"], third["explanation"]) == (3.25, None, None)
    named = page_data(model, sae, tokens[:4], features=[1], judge_scores={1: 2})
    assert named["score_name"] == "judge score"


# --- the feature table ----------------------------------------------------------------------------


def find_table(model, sae, tokens, **options):
    batches = activation_batches(model, sae, tokens)
    return find_contexts(sae, batches, model.tokenizer, ContextOptions(**options))


def test_profiles_are_those_of_the_feature_table(data, model, sae, tokens):
    table = find_table(model, sae, tokens)
    for f in data["features"]:
        profile = table.profile(f["feature"])
        assert {int(b): n for b, n in f["n_fired_by_block"].items()} == profile.n_fired_by_block
        assert f["density"] == pytest.approx(profile.density, rel=1e-5)
        assert f["mean_block"] == pytest.approx(profile.mean_block, rel=1e-5)
        assert f["max_activation"] == pytest.approx(profile.max_activation, rel=1e-6)


def test_contexts_of_a_feature_table_are_shown(model, sae, tokens, expected):
    table = find_table(model, sae, tokens, threshold=0.5)
    # fewer tokens than the table was made of: its contexts cannot come from this pass
    data = page_data(model, sae, tokens[:2], n_features=5, feature_table=table)
    order = to_look_at_first(expected.acts, expected.kept.sum(), table.interpretable)
    assert [f["feature"] for f in data["features"]] == order[:5]
    for f in data["features"]:
        contexts = table.contexts_of(f["feature"])[:N_CONTEXTS]
        assert len(contexts) >= 4
        for shown, context in zip(f["contexts"], contexts, strict=True):
            at = shown["at"]
            pieces = [data["words"][i] for i in shown["tokens"]]
            pieces[at] = f"<ACTIVATED>{pieces[at]}</ACTIVATED>"
            assert "".join(pieces) == context.text
            assert (shown["sequence"], shown["position"]) == (context.sequence, context.position)
            assert shown["blocks"][at] == context.block in BLOCKS
            assert shown["acts"][at] == pytest.approx(context.activation, rel=1e-5)
            assert shown["weights"][at] == pytest.approx(context.weight, abs=6e-4)
            around = [shown["acts"], shown["blocks"], shown["weights"]]
            assert all(len(column) == len(pieces) for column in around)
            assert all(v is None for column in around for i, v in enumerate(column) if i != at)


def test_a_feature_without_contexts_in_the_table_shows_those_of_the_text(model, sae, tokens):
    table = find_table(model, sae, tokens, min_contexts=6, threshold=3.0)
    without = next(
        f for f in range(96) if f not in table.interpretable and table.profile(f).n_fired
    )
    plain = page_data(model, sae, tokens, features=[without])
    assert page_data(model, sae, tokens, features=[without], feature_table=table) == plain


def test_a_feature_table_of_another_sae_is_refused(model, sae, tokens):
    table = find_table(model, sae, tokens[:4])
    other = routed_sae(model, blocks=[2, 5, 6, 9, 11])
    with pytest.raises(UserError, match=r"routed_blocks=\[3, 5, 6, 9, 11\], but this SAE has"):
        page_data(model, other, tokens[:4], feature_table=table)
    empty = find_table(model, sae, tokens[:4], threshold=1e6)
    with pytest.raises(UserError, match="no interpretable features"):
        page_data(model, sae, tokens[:4], feature_table=empty)
