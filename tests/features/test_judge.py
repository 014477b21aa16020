"""The judge against a real server on loopback that fails in many ways."""

import asyncio
import re
import sys
import time
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import numpy as np
import pytest
from support.feature_tables import BLOCKS, plain_table
from support.judge import (
    as_text,
    broken_json,
    drop,
    drop_within_the_body,
    good_answer,
    judge_of,
    status,
    web_page,
)

from sae_lens_route.errors import UserError
from sae_lens_route.features import judge as room
from sae_lens_route.features.judge import Judge, sample_features
from sae_lens_route.features.judge_prompt import CATEGORIES, prompt
from sae_lens_route.features.judge_results import answers, read_results


def test_every_feature_is_asked_once_and_written_once(endpoint, tmp_path):
    run = judge_of(endpoint).run(plain_table(12), tmp_path / "new" / "r.jsonl", n_features=12)
    assert endpoint.counts() == dict.fromkeys(range(12), 1)
    assert answers(run.results) == {f: good_answer(f) for f in range(12)}
    assert read_results(tmp_path / "new" / "r.jsonl") == run.results
    assert run.results[3].prompt_tokens == 7
    assert run.failed == {}
    path, key, body = endpoint.bodies[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer k")
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("tiny", 0.1, 256)
    scores = [good_answer(f).score for f in range(12)]
    assert run.summary.mean_score == pytest.approx(sum(scores) / 12)
    assert run.summary.category_shares == dict.fromkeys(CATEGORIES, 4 / 12)


def test_answers_are_held_to_a_schema_where_the_endpoint_takes_one(endpoint, tmp_path):
    judge_of(endpoint).run(plain_table(3), tmp_path / "r.jsonl")
    formats = [body["response_format"] for _, _, body in endpoint.bodies]
    assert formats == [formats[0]] * 3 and formats[0]["type"] == "json_schema"
    schema = formats[0]["json_schema"]["schema"]
    assert schema["required"] == ["category", "score", "explanation"]
    assert schema["properties"]["category"]["enum"] == list(CATEGORIES)
    judge_of(endpoint, structured=False).run(plain_table(1), tmp_path / "plain.jsonl")
    assert "response_format" not in endpoint.bodies[-1][2]


@pytest.mark.parametrize("refusal", [400, 422])
def test_an_endpoint_that_refuses_the_schema_is_asked_without(endpoint, tmp_path, refusal):
    def behave(feature, nth):
        schema = "response_format" in endpoint.bodies[-1][2]
        return status(refusal) if schema else as_text(good_answer(feature))

    endpoint.behave = behave
    judge = judge_of(endpoint, concurrency=1, max_attempts=1)
    run = judge.run(plain_table(4), tmp_path / "r.jsonl")
    assert answers(run.results) == {f: good_answer(f) for f in range(4)}
    assert sorted(endpoint.counts().values()) == [1, 1, 1, 2]


TROUBLES = {
    0: status(500),
    1: status(429),
    2: drop,
    3: drop_within_the_body,
    4: web_page,
    5: broken_json,
    6: status(503, [("Retry-After", "0.1")]),
    7: lambda handler: handler.reply(200, {"choices": []}),
    8: lambda handler: handler.reply(200, {"choices": None}),
    9: status(408),
}


def test_passing_trouble_is_retried(endpoint, tmp_path):
    endpoint.behave = lambda f, nth: TROUBLES[f] if nth <= 2 else as_text(good_answer(f))
    run = judge_of(endpoint).run(plain_table(10), tmp_path / "r.jsonl")
    assert answers(run.results) == {f: good_answer(f) for f in range(10)}
    assert endpoint.counts() == dict.fromkeys(range(10), 3)
    assert {r.attempts for r in run.results.values()} == {3}


def test_lasting_trouble_fails_those_features_only(endpoint, tmp_path):
    endpoint.behave = lambda f, nth: TROUBLES.get(f) or as_text(good_answer(f))
    table, path = plain_table(14), tmp_path / "r.jsonl"
    run = judge_of(endpoint, max_attempts=2).run(table, path)
    assert set(run.failed) == set(TROUBLES)
    assert "500" in run.failed[0] and "429" in run.failed[1]
    assert endpoint.counts() == {f: 2 if f in TROUBLES else 1 for f in range(14)}
    assert run.summary.n_failed == 10 and run.summary.n_valid == 4
    assert run.summary.mean_score == np.mean([good_answer(f).score for f in range(10, 14)])
    # once the trouble is over, only those are asked again
    endpoint.behave = lambda f, nth: as_text(good_answer(f))
    endpoint.asked.clear()
    again = judge_of(endpoint).run(table, path)
    assert endpoint.counts() == dict.fromkeys(TROUBLES, 1)
    assert again.summary.n_valid == 14 and again.failed == {}


def test_slow_answers_time_out_and_are_asked_again(endpoint, tmp_path):
    def behave(feature, nth):
        if feature == 1 and nth == 1:
            time.sleep(1.5)
        return as_text(good_answer(feature))

    endpoint.behave = behave
    run = judge_of(endpoint, timeout=0.5).run(plain_table(3), tmp_path / "r.jsonl")
    assert answers(run.results) == {f: good_answer(f) for f in range(3)}
    assert endpoint.counts() == {0: 1, 1: 2, 2: 1}


def test_an_answer_that_trickles_in_times_out_as_a_whole(endpoint, tmp_path):
    def trickle(handler):
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        for _ in range(20):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.1)

    endpoint.behave = lambda f, nth: trickle if nth == 1 else as_text(good_answer(f))
    start = time.monotonic()
    run = judge_of(endpoint, timeout=0.4).run(plain_table(1), tmp_path / "r.jsonl")
    assert answers(run.results) == {0: good_answer(0)}
    assert time.monotonic() - start < 1.5


def test_retry_after_is_respected(endpoint, tmp_path):
    endpoint.behave = lambda f, nth: (
        status(429, [("Retry-After", "1")]) if nth == 1 else as_text(good_answer(f))
    )
    judge_of(endpoint).run(plain_table(1), tmp_path / "r.jsonl")
    first, second = endpoint.times(0)
    assert 1.0 <= second - first < 2.0


def test_a_feature_fails_when_the_server_asks_for_a_longer_wait_than_allowed(endpoint, tmp_path):
    endpoint.behave = lambda f, nth: status(429, [("Retry-After", "3600")])
    run = judge_of(endpoint).run(plain_table(1), tmp_path / "r.jsonl")
    assert "3600 s" in run.failed[0]
    assert endpoint.counts() == {0: 1}


def test_retry_after_in_each_of_its_forms():
    soon = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=30), usegmt=True)
    past = format_datetime(datetime.now(timezone.utc) - timedelta(seconds=30), usegmt=True)
    assert room._retry_after({"retry-after": "2.5"}) == 2.5
    assert 28 < room._retry_after({"retry-after": soon}) <= 30
    for nothing in (past, "-1", "nan", "inf", "later", ""):
        assert room._retry_after({"retry-after": nothing}) == 0
    assert room._retry_after({}) == 0


def test_backoff_doubles_with_jitter(endpoint, tmp_path):
    endpoint.behave = lambda f, nth: status(500)
    judge_of(endpoint, backoff=0.2, max_attempts=4).run(plain_table(1), tmp_path / "r.jsonl")
    waits = np.diff(endpoint.times(0))
    for wait, full in zip(waits, (0.2, 0.4, 0.8), strict=True):
        assert full / 2 <= wait < full + 0.3


@pytest.mark.parametrize("limit", [1, 3])
def test_the_concurrency_limit_is_kept_and_used(endpoint, tmp_path, limit):
    def behave(feature, nth):
        time.sleep(0.05)
        return status(500) if nth == 1 and feature % 4 == 0 else as_text(good_answer(feature))

    endpoint.behave = behave
    judge_of(endpoint, concurrency=limit).run(plain_table(12), tmp_path / "r.jsonl")
    assert endpoint.most_under_way == limit


@pytest.mark.parametrize(
    "refusal", [status(401), status(404), status(402), status(429, (), "insufficient_quota")]
)
def test_what_would_fail_for_every_feature_stops_the_run(endpoint, tmp_path, refusal):
    def behave(f, nth):
        return as_text(good_answer(f)) if f in [g for g, _ in endpoint.asked[:5]] else refusal

    endpoint.behave = behave
    path = tmp_path / "r.jsonl"
    with pytest.raises(ValueError, match="the endpoint answers every request with status 4"):
        judge_of(endpoint, concurrency=2).run(plain_table(50), path)
    assert len(endpoint.asked) <= 8
    assert 4 <= len(read_results(path)) <= 5  # one may be under way when the run stops
    endpoint.behave = lambda f, nth: as_text(good_answer(f))
    assert judge_of(endpoint).run(plain_table(50), path).summary.n_valid == 50


def test_a_refused_request_is_not_repeated(endpoint, tmp_path):
    endpoint.behave = lambda f, nth: status(400) if f == 2 else as_text(good_answer(f))
    run = judge_of(endpoint, structured=False).run(plain_table(4), tmp_path / "r.jsonl")
    assert set(run.failed) == {2}
    assert endpoint.counts() == dict.fromkeys(range(4), 1)


MALFORMED = ["", "4", "I would say 4.", "```\nnothing\n```", '{"score": 4}', None, "half a \ud83d"]


def test_malformed_answers_are_kept_counted_and_not_asked_again(endpoint, tmp_path):
    endpoint.behave = lambda f, nth: MALFORMED[f] if f < 7 else as_text(good_answer(f))
    path = tmp_path / "r.jsonl"
    judge_of(endpoint).run(plain_table(9), path)
    run = judge_of(endpoint).run(plain_table(9), path)
    assert endpoint.counts() == dict.fromkeys(range(9), 1)
    assert (run.summary.n_malformed, run.summary.n_valid, run.summary.n_failed) == (7, 2, 0)
    assert [run.results[f].reply for f in range(7)] == [text or "" for text in MALFORMED]
    assert run.results[1].score is None
    assert run.summary.mean_score == np.mean([good_answer(7).score, good_answer(8).score])


def test_without_a_valid_answer_means_are_none(endpoint, tmp_path):
    endpoint.behave = lambda f, nth: status(500) if f % 2 else "no idea"
    run = judge_of(endpoint, max_attempts=1).run(plain_table(6), tmp_path / "r.jsonl")
    assert run.summary.mean_score is None
    assert run.summary.category_shares is None
    assert run.summary.mean_score_by_depth == {"shallow": None, "deep": None}
    assert run.summary.mean_score_by_block == dict.fromkeys(BLOCKS)
    assert (run.summary.n_features, run.summary.n_malformed, run.summary.n_failed) == (6, 3, 3)


def test_the_key_comes_from_the_environment_and_its_lack_is_one_line(
    endpoint, tmp_path, monkeypatch
):
    table = plain_table(1)
    with pytest.raises(ValueError, match="OPENAI_API_KEY"):
        judge_of(endpoint, api_key=None).run(table, tmp_path / "r.jsonl")
    monkeypatch.setenv("OPENAI_API_KEY", "from-env")
    judge_of(endpoint, api_key=None).run(table, tmp_path / "r.jsonl")
    assert endpoint.bodies[0][1] == "Bearer from-env"
    assert "from-env" not in (tmp_path / "r.jsonl").read_text()
    assert "secret" not in repr(judge_of(endpoint, api_key="secret"))


def test_a_missing_client_says_what_to_install(endpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=re.escape("pip install 'sae-lens-route[interpret]'")):
        judge_of(endpoint).run(plain_table(1), tmp_path / "r.jsonl")


def test_it_runs_within_an_event_loop(endpoint, tmp_path):
    async def notebook():
        return await judge_of(endpoint).run_async(plain_table(3), tmp_path / "r.jsonl")

    assert asyncio.run(notebook()).summary.n_valid == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"concurrency": 0}, "concurrency=0"),
        ({"max_attempts": 0}, "max_attempts=0"),
        ({"timeout": 0.0}, "timeout=0.0"),
        ({"request": {"stream": True}}, "'stream'"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Judge(model="tiny", **changes)


def test_the_estimate_counts_what_is_left_and_is_shown_first(endpoint, tmp_path, capsys):
    table, path = plain_table(10), tmp_path / "r.jsonl"
    judge = judge_of(endpoint, prices=(2.0, 8.0), request={"max_tokens": 100})
    prompts = [prompt(table.contexts_of(f)) for f in range(10)]
    tokens = sum(-(-len(text) // 4) for text in prompts)
    estimate = judge.estimate(table)
    assert estimate[:3] == (10, tokens, 1000)
    assert estimate.cost == pytest.approx(tokens * 2e-6 + 1000 * 8e-6)
    judge.run(table, path, n_features=4)
    shown = capsys.readouterr().err
    assert "4 requests" in shown and "cost 0.00" in shown
    assert shown.index("4 requests") < shown.index("feature")
    assert judge.estimate(table, path).n_requests == 6
    assert judge_of(endpoint).estimate(table).cost is None
    unlimited = judge_of(endpoint, prices=(1.0, 1.0), request={}).estimate(table)
    assert unlimited.completion_tokens is None and unlimited.cost is None


def test_samples_are_seeded_without_repeats_and_extend_each_other():
    table = plain_table(150)
    sample = sample_features(table)
    assert len(sample) == len(set(sample)) == 100
    assert sample == sample_features(table, seed=0) != sample_features(table, seed=1)
    assert sample_features(table, 120)[:100] == sample
    assert sorted(sample_features(table, 1000)) == list(range(150))
    with pytest.raises(ValueError, match="n_features=0"):
        sample_features(table, 0)
