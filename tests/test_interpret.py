"""The judge against a real server on loopback, killed and resumed; agreement and the statistic."""

import asyncio
import csv
import json
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sae_lens_route import interpret
from sae_lens_route.features import (
    Context,
    ContextOptions,
    ContextRun,
    FeatureProfile,
    FeatureTable,
)
from sae_lens_route.interpret import (
    CATEGORIES,
    OFFLINE_KIND,
    Answer,
    Judge,
    MalformedAnswer,
    agreement,
    answers,
    offline_ranking,
    offline_score,
    parse_answer,
    prompt,
    read_results,
    read_sheet,
    sample_features,
    summarize,
    write_offline_ranking,
    write_sheet,
)

HOOKS = tuple(f"blocks.{i}.hook_resid_post" for i in range(3))


def make_context(feature, token="cat", activation=2.0, left="", sequence=0, position=0):
    return Context(
        feature=feature,
        token_class=token.lower(),
        token=token,
        activation=activation,
        layer=0,
        hook=HOOKS[0],
        weight=0.5,
        text=f"{left}<ACTIVATED>{token}</ACTIVATED> of feature-{feature}",
        sequence=sequence,
        position=position,
    )


def make_table(contexts, layer_share=None):
    """A table of these contexts, as `find_contexts` would return it."""
    contexts = sorted(contexts, key=lambda c: (c.feature, c.token_class, -c.activation))
    counts = Counter(c.feature for c in contexts)
    d_sae = max(counts) + 1
    profiles = []
    for feature in range(d_sae):
        share = (layer_share or {}).get(feature, [1.0, 0.0, 0.0])
        mean_layer = float(np.dot(share, range(len(HOOKS))))
        profiles.append(
            FeatureProfile(
                feature=feature,
                interpretable=feature in counts,
                n_contexts=counts[feature],
                n_classes=1,
                n_fired=10,
                density=0.1,
                max_activation=2.0,
                layer_counts=[int(10 * s) for s in share],
                layer_share=share,
                mean_layer=mean_layer,
                layer_entropy=0.0,
                depth="shallow" if mean_layer < 1 else "deep",
            )
        )
    return FeatureTable(
        contexts=pa.Table.from_pylist([c._asdict() for c in contexts]),
        features=pa.Table.from_pylist([p._asdict() for p in profiles]),
        run=ContextRun(
            options=ContextOptions(threshold=1.0),
            hook_names=HOOKS,
            d_sae=d_sae,
            n_tokens=1000,
            n_sequences=10,
            counts=(),
        ),
    )


def plain_table(n_features):
    return make_table(
        [make_context(f, activation=2.0 + i, position=i) for f in range(n_features) for i in (0, 1)]
    )


# --- the server ---------------------------------------------------------------------------------


def good_answer(feature):
    return Answer(CATEGORIES[feature % 3], feature % 5 + 1, f"about {feature}")


def as_text(answer):
    return json.dumps(answer._asdict())


class Endpoint(ThreadingHTTPServer):
    """An OpenAI-compatible server. `behave(feature, nth)` says what the nth request gets.

    That is a text, or a function of the request handler that answers in its own way.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave = lambda feature, nth: as_text(good_answer(feature))
        self.lock = threading.Lock()
        self.asked = []  # (feature, time), in the order of arrival
        self.bodies = []
        self.under_way = self.most_under_way = 0
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass  # a killed client hangs up

    def times(self, feature):
        return [at for f, at in self.asked if f == feature]

    def counts(self):
        return Counter(feature for feature, _ in self.asked)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Endpoint

    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        feature = int(re.findall(r"feature-(\d+)", body["messages"][0]["content"])[0])
        server = self.server
        with server.lock:
            server.asked.append((feature, time.monotonic()))
            server.bodies.append((self.path, self.headers["Authorization"], body))
            nth = len(server.times(feature))
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        try:
            action = server.behave(feature, nth)
        finally:
            with server.lock:
                server.under_way -= 1
        if callable(action):
            action(self)
        else:
            self.reply(200, completion(action))

    def reply(self, status, content, content_type="application/json", headers=()):
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def completion(text):
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
    }


def status(code, headers=(), error_code=None):
    error = {"error": {"message": "no", "type": "x", "param": None, "code": error_code}}
    return lambda handler: handler.reply(code, error, headers=headers)


def drop(handler):
    handler.close_connection = True
    handler.connection.shutdown(2)


def drop_within_the_body(handler):
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"id": "1", ')
    handler.wfile.flush()
    drop(handler)


def web_page(handler):
    handler.reply(200, "<html>busy</html>", "text/html")


def broken_json(handler):
    handler.reply(200, '{"id": ')


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    server = Endpoint()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def judge_of(endpoint, **changes):
    return Judge(
        **{"model": "tiny", "base_url": endpoint.url, "api_key": "k", "backoff": 0.02, **changes}
    )


# --- asking -------------------------------------------------------------------------------------


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
    assert interpret._retry_after({"retry-after": "2.5"}) == 2.5
    assert 28 < interpret._retry_after({"retry-after": soon}) <= 30
    for nothing in (past, "-1", "nan", "inf", "later", ""):
        assert interpret._retry_after({"retry-after": nothing}) == 0
    assert interpret._retry_after({}) == 0


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
    endpoint.behave = lambda f, nth: refusal if len(endpoint.asked) > 5 else as_text(good_answer(f))
    path = tmp_path / "r.jsonl"
    with pytest.raises(ValueError, match="the endpoint answers with status 4"):
        judge_of(endpoint, concurrency=2).run(plain_table(50), path)
    assert len(endpoint.asked) <= 8
    assert len(read_results(path)) == 5
    endpoint.behave = lambda f, nth: as_text(good_answer(f))
    assert judge_of(endpoint).run(plain_table(50), path).summary.n_valid == 50


def test_a_refused_request_is_not_repeated(endpoint, tmp_path):
    endpoint.behave = lambda f, nth: status(400) if f == 2 else as_text(good_answer(f))
    run = judge_of(endpoint).run(plain_table(4), tmp_path / "r.jsonl")
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
    assert run.summary.mean_score_by_layer == [None, None, None]
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
    with pytest.raises(ImportError, match=re.escape("pip install 'sae-lens-route[interpret]'")):
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


# --- killed and resumed -------------------------------------------------------------------------

KILLED = """
import sys
from sae_lens_route.features import FeatureTable
from sae_lens_route.interpret import Judge
judge = Judge(model="tiny", base_url=sys.argv[1], api_key="k", concurrency=4)
judge.run(FeatureTable.from_parquet(sys.argv[2]), sys.argv[3], n_features=40)
"""


def test_a_killed_run_goes_on_with_nothing_lost_or_scored_twice(endpoint, tmp_path):
    def behave(feature, nth):
        time.sleep(0.1)
        return as_text(good_answer(feature))

    endpoint.behave = behave
    table, path = plain_table(40), tmp_path / "r.jsonl"
    table.to_parquet(tmp_path / "table")
    killed = subprocess.Popen(
        [sys.executable, "-c", KILLED, endpoint.url, str(tmp_path / "table"), str(path)],
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while len(endpoint.asked) < 15:
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()

    at_kill = path.read_bytes()
    with path.open("ab") as file:  # as if it had died in the middle of a line
        file.write(at_kill.splitlines()[0][:100].replace(b'"feature": ', b'"feature": 9'))
    in_file = set(read_results(path))
    asked_before = set(endpoint.counts())
    assert 0 < len(in_file) < 40
    n_before = len(endpoint.asked)

    run = judge_of(endpoint, concurrency=4).run(table, path, n_features=40)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(row["feature"] for row in rows) == list(range(40))
    assert path.read_bytes().startswith(at_kill)
    assert answers(run.results) == {f: good_answer(f) for f in range(40)}
    # what was in the file was not asked again; what was asked twice was under way at the kill
    asked_after = {f for f, _ in endpoint.asked[n_before:]}
    assert not asked_after & in_file
    twice = {f for f, n in endpoint.counts().items() if n > 1}
    assert twice == asked_before - in_file
    assert len(twice) <= 4 and max(endpoint.counts().values()) <= 2


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(cut=st.integers(min_value=0, max_value=4000))
def test_a_file_cut_anywhere_is_completed(endpoint, tmp_path, cut):
    table, path, whole = plain_table(6), tmp_path / "r.jsonl", tmp_path / "whole.jsonl"
    if not whole.exists():
        judge_of(endpoint).run(table, whole)
    content = whole.read_bytes()
    path.write_bytes(content[: min(cut, len(content))])
    kept = set(read_results(path))
    endpoint.asked.clear()
    run = judge_of(endpoint).run(table, path)
    assert endpoint.counts() == {f: 1 for f in range(6) if f not in kept}
    assert read_results(path) == {f: run.results[f] for f in read_results(path)}
    assert answers(run.results) == {f: good_answer(f) for f in range(6)}
    assert len(path.read_bytes().splitlines()) == 6


def test_a_finished_run_asks_nothing_and_a_larger_sample_only_what_is_new(endpoint, tmp_path):
    table, path = plain_table(30), tmp_path / "r.jsonl"
    judge_of(endpoint).run(table, path, n_features=10, seed=3)
    judge_of(endpoint).run(table, path, n_features=10, seed=3)
    assert len(endpoint.asked) == 10
    run = judge_of(endpoint).run(table, path, n_features=20, seed=3)
    assert len(endpoint.asked) == 20
    assert list(run.results) == sample_features(table, 20, 3)


def test_replies_to_other_questions_are_not_mixed_in(endpoint, tmp_path):
    table, path = plain_table(3), tmp_path / "r.jsonl"
    judge_of(endpoint).run(table, path)
    before = path.read_bytes()
    other = make_table([make_context(f, token="dog") for f in range(3) for _ in range(2)])
    with pytest.raises(ValueError, match="choose another file"):
        judge_of(endpoint, model="other").run(table, path)
    with pytest.raises(ValueError, match="choose another file"):
        judge_of(endpoint, request={"temperature": 1.0}).run(table, path)
    with pytest.raises(ValueError, match="choose another file"):
        judge_of(endpoint).run(other, path)
    assert path.read_bytes() == before
    assert len(endpoint.asked) == 3


@pytest.mark.skipif(sys.platform == "win32", reason="no flock")
def test_two_runs_do_not_share_a_file(endpoint, tmp_path):
    path = tmp_path / "r.jsonl"
    with (
        interpret._ResultsFile(path),
        pytest.raises(ValueError, match="another run is writing"),
    ):
        judge_of(endpoint).run(plain_table(1), path)
    assert judge_of(endpoint).run(plain_table(1), path).summary.n_valid == 1


def test_a_broken_file_is_refused(endpoint, tmp_path):
    path = tmp_path / "r.jsonl"
    judge_of(endpoint).run(plain_table(2), path)
    line = path.read_bytes().splitlines(keepends=True)[0]
    for content, message in (
        (b"nonsense\n" + line, "line 1: no result"),
        (line + b"[1]\n" + line, "line 2: no result"),
        (line + line, "line 2: feature"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_results(path)
        with pytest.raises(ValueError, match=message):
            judge_of(endpoint).run(plain_table(2), path)
        assert path.read_bytes() == content


# --- estimate, sample, prompt, parser -----------------------------------------------------------


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


def test_the_prompt_shows_the_strongest_contexts_as_one_json_line_each():
    contexts = [make_context(0, token=f"t{i}", activation=float(i)) for i in range(80)]
    contexts[79] = contexts[79]._replace(text='two\nlines "quoted" <ACTIVATED>é</ACTIVATED>')
    lines = prompt(contexts).splitlines()[-64:]
    shown = [json.loads(line) for line in lines]
    assert [s["activation"] for s in shown] == [float(i) for i in range(79, 15, -1)]
    assert shown[0]["context"] == contexts[79].text
    assert "é" in lines[0]
    assert len(prompt(contexts, 5).splitlines()) == len(prompt(contexts).splitlines()) - 59


answer_strategy = st.builds(
    Answer,
    st.sampled_from(CATEGORIES),
    st.integers(1, 5),
    st.text(min_size=1).filter(lambda text: text.strip() != ""),
)


@given(answer_strategy, st.sampled_from(["{}", " \n{}\n", "```json\n{}\n```", "```\n{}\n```"]))
def test_answers_in_the_format_are_read_as_they_are(answer, frame):
    assert parse_answer(frame.replace("{}", as_text(answer))) == answer


@given(st.text(max_size=60))
def test_other_text_is_malformed(text):
    with pytest.raises(MalformedAnswer):
        parse_answer(text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@given(answer_strategy, st.sampled_from(Answer._fields), json_values)
def test_a_wrong_value_in_any_field_is_malformed(answer, name, value):
    right = {
        "category": isinstance(value, str) and value in CATEGORIES,
        "score": type(value) is int and 1 <= value <= 5,
        "explanation": isinstance(value, str) and bool(value.strip()),
    }
    text = json.dumps({**answer._asdict(), name: value})
    if right[name]:
        assert getattr(parse_answer(text), name) == value
    else:
        with pytest.raises(MalformedAnswer):
            parse_answer(text)


@given(answer_strategy, st.integers(min_value=1))
def test_an_answer_that_was_cut_is_malformed(answer, n_cut):
    text = as_text(answer)
    with pytest.raises(MalformedAnswer):
        parse_answer(text[: max(0, len(text) - n_cut)])


@pytest.mark.parametrize(
    "text",
    [
        '{"category": "low-level", "score": 4, "explanation": "a"} Done.',
        'Sure: {"category": "low-level", "score": 4, "explanation": "a"}',
        '{"category": "low-level", "score": 4, "score": 5, "explanation": "a"}',
        '{"category": "low-level", "score": 4, "explanation": "a", "sure": true}',
        '{"category": "low-level", "score": "4", "explanation": "a"}',
        '{"category": "low-level", "score": 4.0, "explanation": "a"}',
        '{"category": "low-level", "score": true, "explanation": "a"}',
        '{"category": "Low-level", "score": 4, "explanation": "a"}',
        '{"category": "low-level", "score": 4, "explanation": "  "}',
        '{"category": ["low-level"], "score": 4, "explanation": "a"}',
        '[{"category": "low-level", "score": 4, "explanation": "a"}]',
        '{"score": ' + "9" * 5000 + "}",
        "[" * 100_000,
    ],
)
def test_nothing_is_guessed(text):
    with pytest.raises(MalformedAnswer):
        parse_answer(text)


# --- summary ------------------------------------------------------------------------------------


def make_result(feature, answer):
    found = answer._asdict() if answer else dict.fromkeys(Answer._fields)
    return interpret.JudgeResult(
        feature=feature,
        status="valid" if answer else "malformed",
        **found,
        reply="",
        model="tiny",
        request_sha256="",
        attempts=1,
        prompt_tokens=None,
        completion_tokens=None,
    )


def test_the_summary_by_depth_and_layer():
    share = {0: [1.0, 0.0, 0.0], 1: [0.5, 0.5, 0.0], 2: [0.0, 0.0, 1.0], 3: [0.0, 0.5, 0.5]}
    table = make_table([make_context(f) for f in range(5)], layer_share=share)
    results = {
        0: make_result(0, Answer("low-level", 5, "a")),
        1: make_result(1, Answer("low-level", 2, "b")),
        2: make_result(2, Answer("high-level", 3, "c")),
        3: make_result(3, None),
    }
    summary = summarize(table, [0, 1, 2, 3, 4], results)
    assert summary.mean_score == pytest.approx(10 / 3)
    assert (summary.n_valid, summary.n_malformed, summary.n_failed) == (3, 1, 1)
    assert summary.score_counts == {1: 0, 2: 1, 3: 1, 4: 0, 5: 1}
    assert summary.category_shares == {
        "low-level": pytest.approx(2 / 3),
        "high-level": pytest.approx(1 / 3),
        "undiscernible": 0.0,
    }
    assert summary.mean_score_by_depth == {"shallow": 3.5, "deep": 3.0}
    assert summary.mean_score_by_layer == pytest.approx([(5 + 0.5 * 2) / 1.5, 2.0, 3.0])
    json.dumps(summary._asdict())


# --- people and agreement -----------------------------------------------------------------------


def test_a_sheet_is_written_blank_and_read_back(tmp_path):
    contexts = [make_context(f, activation=1.0 + i) for f in (3, 8, 9) for i in range(4)]
    contexts.append(make_context(8, token='=1+"x"', left='a;b,"c"\n\0 ', activation=9.0))
    table, path = make_table(contexts), tmp_path / "sheet.csv"
    write_sheet(table, [8, 3, 9], path)
    assert read_sheet(path) == {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["feature"] for row in rows] == ["8", "3", "9"]
    assert rows[0]["contexts"].count("\n") == 4
    assert rows[0]["contexts"].startswith('1. \'=1+"x"\' 9.00: a;b,"c" <ACTIVATED>')
    rows[0].update(category="low-level", score="4", explanation="x, y")
    rows[1].update(category=" High-Level ", score="2 ")
    for delimiter in ",;\t":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
        expected = {8: Answer("low-level", 4, "x, y"), 3: Answer("high-level", 2, "")}
        assert read_sheet(path) == expected


def test_a_cell_of_the_sheet_fits_into_a_spreadsheet(tmp_path):
    long = [make_context(0, left="word " * 300, activation=float(i + 1)) for i in range(64)]
    write_sheet(make_table(long), [0], tmp_path / "sheet.csv")
    with (tmp_path / "sheet.csv").open(encoding="utf-8-sig", newline="") as file:
        (row,) = csv.DictReader(file)
    assert 30_000 < len(row["contexts"]) <= 32_767
    assert row["contexts"].startswith("1. 'cat' 64.00")


@pytest.mark.parametrize(
    "row",
    [
        *("3,low-level,,x", "3,,4,x", "3,low,4,x", "3,low-level,4.5,x", "3,low-level,6,x"),
        *(",,,", "x,,,", "3,low-level,4,x\n3,low-level,4,x"),
    ],
)
def test_a_half_filled_or_unclear_row_is_refused(tmp_path, row):
    path = tmp_path / "sheet.csv"
    path.write_text(f"feature,category,score,explanation\n{row}\n")
    with pytest.raises(ValueError, match=r"sheet\.csv"):
        read_sheet(path)
    path.write_text("feature,score\n")
    with pytest.raises(ValueError, match="no column category, explanation"):
        read_sheet(path)


def brute_ranks(values):
    return [sum(w < v for w in values) + (sum(w == v for w in values) + 1) / 2 for v in values]


def brute_pearson(a, b):
    n = len(a)
    mean_a, mean_b = sum(a) / n, sum(b) / n
    covariance = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    spread = sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b)
    return covariance / spread**0.5


@given(st.lists(st.tuples(answer_strategy, answer_strategy), min_size=1, max_size=25))
def test_agreement_against_brute_force(pairs):
    first = {f: a for f, (a, _) in enumerate(pairs)} | {900: Answer("low-level", 1, "x")}
    second = {f: b for f, (_, b) in enumerate(pairs)} | {901: Answer("low-level", 1, "x")}
    a, b = ([pair[i].score for pair in pairs] for i in (0, 1))
    n = len(pairs)
    result = agreement(first, second)
    assert result.n == n == sum(map(sum, result.counts))
    assert result.exact == pytest.approx(sum(x == y for x, y in zip(a, b, strict=True)) / n)
    close = sum(x - y in (-1, 0, 1) for x, y in zip(a, b, strict=True))
    assert result.within_one == pytest.approx(close / n)
    assert result.same_category == pytest.approx(sum(x[0] == y[0] for x, y in pairs) / n)
    assert result.mean_difference == pytest.approx((sum(b) - sum(a)) / n)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert result.pearson is None and result.spearman is None
    else:
        assert result.pearson == pytest.approx(brute_pearson(a, b))
        assert result.spearman == pytest.approx(brute_pearson(brute_ranks(a), brute_ranks(b)))
    expected = sum(abs(x - y) for x in a for y in b) / n**2
    observed = sum(abs(x - y) for x, y in zip(a, b, strict=True)) / n
    if expected == 0:
        assert result.kappa is None
    else:
        assert result.kappa == pytest.approx(1 - observed / expected)
    assert result.counts[a[0] - 1][b[0] - 1] >= 1


def test_agreement_of_strangers_is_undefined():
    result = agreement({1: Answer("low-level", 1, "x")}, {2: Answer("low-level", 1, "x")})
    assert result.n == 0
    assert set(result[1:-1]) == {None}


# --- the statistic that needs no model ----------------------------------------------------------

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
    ranking = offline_ranking(table)
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
    assert ranking == offline_ranking(table) != offline_ranking(table, seed=1)


def test_a_feature_of_the_first_position_is_found():
    rng = random.Random(1)
    places = [(a, b, c, 0, i) for i, (a, b, c, _, _) in enumerate(text_places(rng, 60))]
    contexts = contexts_at(0, places, lambda token: 5.0)
    negatives = contexts_at(1, text_places(rng, 60), lambda token: 5.0)
    assert offline_score(contexts, negatives).position > 0.9


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
            values.append(offline_score(active, silent).score)
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
    assert interpret._concordant_pairs(prediction, target) == (sum(wins), len(wins))


def test_the_fit_is_the_documented_one_and_sees_no_held_out_activation(monkeypatch):
    rng = np.random.default_rng(0)
    groups = [rng.integers(0, 5, 40), rng.integers(0, 3, 40)]
    target = rng.uniform(size=40)
    train = np.arange(40) % 4 != 1
    seen = []

    def spy(prediction, _):
        seen.append(prediction)
        return 0.0, 0

    monkeypatch.setattr(interpret, "_concordant_pairs", spy)
    for held_out in (target, 100.0):
        interpret._held_out_pairs(groups, np.where(train, target, held_out), train)
    np.testing.assert_array_equal(seen[0], seen[1])
    # by hand: the mean, then each group's shrunken mean of what is left
    first, second = groups
    mean = target[train].mean()
    effect = [(target - mean)[train & (first == g)] for g in range(5)]
    after = mean + np.array([e.sum() / (len(e) + 1) for e in effect])[first]
    effect = [(target - after)[train & (second == g)] for g in range(3)]
    after = after + np.array([e.sum() / (len(e) + 1) for e in effect])[second]
    np.testing.assert_allclose(seen[0], after[~train])


@pytest.mark.parametrize(("n", "n_pairs"), [(4, 4), (8, 20), (16, 88)])
def test_a_handful_of_contexts_cannot_reach_1(n, n_pairs):
    # in each part the same tokens, with their own strengths: order is known perfectly
    tokens = [f"t{i % (n // 4)}" for i in range(n)]
    contexts = [make_context(0, t, 5.0 + int(t[1:]), sequence=i) for i, t in enumerate(tokens)]
    negatives = [make_context(1, f"u{i}", sequence=i) for i in range(n)]
    at_most = (n_pairs + 8) / (n_pairs + 16)
    score = offline_score(contexts, negatives).token
    assert score == pytest.approx(at_most, abs=0.06) and score <= at_most


def test_too_little_to_go_on_gives_none_and_the_order_does_not_matter():
    rng = random.Random(3)
    contexts = contexts_at(4, text_places(rng, 20), lambda token: rng.uniform(1, 5))
    negatives = contexts_at(5, text_places(rng, 20), lambda token: 2.0)
    score = offline_score(contexts, negatives)
    assert score == offline_score(contexts[::-1], negatives[::-1])
    assert (score.feature, score.n_contexts) == (4, len(contexts))
    few = offline_score(contexts[:3], negatives)
    assert few.score is None and few.n_contexts == 3
    same = [c._replace(activation=2.0) for c in contexts]
    assert offline_score(same).score is None  # no two activations differ, and no negatives
    for wrong in ([], [*contexts, *negatives]):
        with pytest.raises(ValueError, match="one feature"):
            offline_score(wrong)


def test_the_ranking_uses_the_statistic_and_says_what_it_is(tmp_path):
    table = synthetic_table(1)
    ranking = offline_ranking(table)
    assert all(s.n_negatives == s.n_contexts > 0 and s.kind == OFFLINE_KIND for s in ranking)
    write_offline_ranking(ranking, tmp_path / "offline.json")
    written = json.loads((tmp_path / "offline.json").read_text())
    assert "not the paper's score" in written["kind"]
    assert [row["feature"] for row in written["features"]] == [s.feature for s in ranking]
    assert all("not the paper's score" in row["kind"] for row in written["features"])
