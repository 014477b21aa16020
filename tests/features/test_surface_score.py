"""The surface score: simple features rank above random ones, and the fit is the documented one."""

import json
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.feature_tables import make_context, make_table

from sae_lens_route.features import surface_score as room
from sae_lens_route.features.surface_score import (
    SURFACE_KIND,
    surface_ranking,
    surface_score,
    write_surface_ranking,
)

WORDS = [f"w{i}" for i in range(200)]
FREQUENCY = [1 / (i + 5) for i in range(len(WORDS))]


def text_places(rng, n):
    """Places of a text: two words before, token, position, sequence; some words are frequent."""
    return [
        (*rng.choices(WORDS, FREQUENCY, k=3), rng.randrange(100), rng.randrange(10_000))
        for _ in range(n)
    ]


def contexts_at(feature, places, activation):
    """At most 2 contexts per token, the strongest, as in a table."""
    found = [
        make_context(feature, token, activation(token), f"{w1} {w2} ", sequence, position)
        for w1, w2, token, position, sequence in places
    ]
    kept, counts = [], Counter()
    for context in sorted(found, key=lambda c: -c.activation):
        counts[context.token] += 1
        if counts[context.token] <= 2:
            kept.append(context)
    return kept


def synthetic_feature(rng, feature, kind):
    """Contexts of a feature of a few words, of what follows two words, or of nothing."""
    places = text_places(rng, 100)
    if kind == "random":
        return contexts_at(feature, places, lambda token: rng.uniform(5, 15))
    strength = {word: rng.uniform(5, 15) for word in WORDS}
    if kind == "token":
        own = rng.sample(WORDS, 8)
        places = [(w1, w2, rng.choice(own), *where) for w1, w2, _, *where in places]
    else:
        pair = rng.sample(WORDS, 2)
        places = [(*pair, token, *where) for _, _, token, *where in places]
    return contexts_at(feature, places, strength.__getitem__)


KINDS = ["token", "phrase", *["random"] * 8]


def synthetic_table(n):
    rng = random.Random(0)
    contexts = [c for f in range(10 * n) for c in synthetic_feature(rng, f, KINDS[f % 10])]
    return make_table(contexts)


def test_simple_features_rank_above_random_ones():
    table = synthetic_table(8)
    ranking = surface_ranking(table)
    assert {KINDS[s.feature % 10] for s in ranking[:16]} == {"token", "phrase"}
    mean = {
        (kind, name): np.mean([getattr(s, name) for s in ranking if KINDS[s.feature % 10] == kind])
        for kind in ("token", "phrase", "random")
        for name in ("score", "token", "ngram", "position")
    }
    assert mean["token", "score"] > 0.75 and mean["token", "token"] > 0.75
    assert mean["phrase", "score"] > 0.75 and mean["phrase", "ngram"] > 0.75
    chance = [("random", "score"), ("random", "token"), ("random", "ngram"), ("token", "ngram")]
    for kind, name in [*chance, *((kind, "position") for kind in ("token", "phrase", "random"))]:
        assert mean[kind, name] == pytest.approx(0.5, abs=0.06), (kind, name)
    assert [s.score for s in ranking] == sorted((s.score for s in ranking), reverse=True)
    assert ranking == surface_ranking(table) != surface_ranking(table, seed=1)


def test_a_feature_of_the_first_position_scores_high():
    rng = random.Random(1)
    places = [(a, b, c, 0, i) for i, (a, b, c, _, _) in enumerate(text_places(rng, 60))]
    contexts = contexts_at(0, places, lambda token: 5.0)
    negatives = contexts_at(1, text_places(rng, 60), lambda token: 5.0)
    assert surface_score(contexts, negatives).position > 0.9


def test_the_score_rises_with_the_share_that_tokens_explain():
    def score(purity):
        values = []
        for seed in range(20):
            rng = random.Random(seed)
            own = [f"own{i}" for i in range(10)]
            places = [
                (a, b, rng.choice(own) if rng.random() < purity else c, p, s)
                for a, b, c, p, s in text_places(rng, 60)
            ]
            active = [make_context(0, c, 5.0, f"{a} {b} ", s, p) for a, b, c, p, s in places]
            places = text_places(rng, 60)
            silent = [make_context(1, c, 5.0, f"{a} {b} ", s, p) for a, b, c, p, s in places]
            values.append(surface_score(active, silent).score)
        return np.mean(values)

    scores = [score(purity) for purity in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert scores == sorted(scores)
    assert scores[0] == pytest.approx(0.5, abs=0.06)
    assert scores[-1] > 0.97


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=20),
)
def test_concordance_against_brute_force(pairs):
    prediction, target = (np.array(x, dtype=float) for x in zip(*pairs, strict=True))
    wins = [1.0 if p > q else 0.5 if p == q else 0.0 for p, t in pairs for q, u in pairs if t > u]
    assert room._concordant_pairs(prediction, target) == (sum(wins), len(wins))


def test_the_fit_is_the_documented_one_and_sees_no_held_out_activation():
    rng = np.random.default_rng(0)
    first, second = groups = [rng.integers(0, 5, 40), rng.integers(0, 3, 40)]
    target = rng.uniform(size=40)
    train = np.arange(40) % 4 != 1
    prediction = room._prediction(groups, target, train)
    unseen = room._prediction(groups, np.where(train, target, 100.0), train)
    np.testing.assert_array_equal(prediction, unseen)
    # by hand: the mean, then each group's shrunken mean of the residuals
    mean = target[train].mean()
    effect = [(target - mean)[train & (first == g)] for g in range(5)]
    after = mean + np.array([e.sum() / (len(e) + 1) for e in effect])[first]
    effect = [(target - after)[train & (second == g)] for g in range(3)]
    after = after + np.array([e.sum() / (len(e) + 1) for e in effect])[second]
    np.testing.assert_allclose(prediction, after)


@pytest.mark.parametrize(("n", "n_pairs"), [(4, 4), (8, 20), (16, 88)])
def test_a_handful_of_contexts_cannot_reach_1(n, n_pairs):
    # in each part the same tokens, with their own strengths: order is known perfectly
    tokens = [f"t{i % (n // 4)}" for i in range(n)]
    contexts = [make_context(0, t, 5.0 + int(t[1:]), sequence=i) for i, t in enumerate(tokens)]
    negatives = [make_context(1, f"u{i}", sequence=i) for i in range(n)]
    at_most = (n_pairs + 8) / (n_pairs + 16)
    score = surface_score(contexts, negatives).token
    assert score == pytest.approx(at_most, abs=0.06) and score <= at_most


def test_too_few_contexts_have_no_score_and_the_order_does_not_matter():
    rng = random.Random(3)
    contexts = contexts_at(4, text_places(rng, 20), lambda token: rng.uniform(1, 5))
    negatives = contexts_at(5, text_places(rng, 20), lambda token: 2.0)
    score = surface_score(contexts, negatives)
    assert score == surface_score(contexts[::-1], negatives[::-1])
    assert (score.feature, score.n_contexts) == (4, len(contexts))
    few = surface_score(contexts[:3], negatives)
    assert few.score is None and few.n_contexts == 3
    same = [c._replace(activation=2.0) for c in contexts]
    assert surface_score(same).score is None  # no two activations differ, and no negatives
    for wrong in ([], [*contexts, *negatives]):
        with pytest.raises(ValueError, match="one feature"):
            surface_score(wrong)


def test_the_ranking_file_says_that_it_is_not_the_papers_score(tmp_path):
    table = synthetic_table(1)
    ranking = surface_ranking(table)
    assert all(s.n_negatives == s.n_contexts > 0 and s.kind == SURFACE_KIND for s in ranking)
    write_surface_ranking(ranking, tmp_path / "surface_ranking.json")
    written = json.loads((tmp_path / "surface_ranking.json").read_text())
    assert "not the paper's score" in written["kind"]
    assert [row["feature"] for row in written["features"]] == [s.feature for s in ranking]
    assert all("not the paper's score" in row["kind"] for row in written["features"])
