"""A judge's results file: killed runs resume, and nothing is lost, repeated or mixed."""

import json
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.feature_tables import make_context, make_table, plain_table
from support.judge import as_text, good_answer, judge_of

from sae_lens_route.features.judge import sample_features
from sae_lens_route.features.judge_prompt import Answer
from sae_lens_route.features.judge_results import (
    JudgeResult,
    ResultsFile,
    answers,
    read_results,
    summarize,
)

KILLED = """
import sys
from sae_lens_route.features.judge import Judge
from sae_lens_route.features.table import FeatureTable
judge = Judge(model="tiny", base_url=sys.argv[1], api_key="k", concurrency=4)
judge.run(FeatureTable.from_parquet(sys.argv[2]), sys.argv[3], n_features=40)
"""


def test_a_killed_run_resumes_with_nothing_lost_or_scored_twice(endpoint, tmp_path):
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


def test_results_of_other_prompts_are_not_mixed_in(endpoint, tmp_path):
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
        ResultsFile(path),
        pytest.raises(ValueError, match="another run is writing"),
    ):
        judge_of(endpoint).run(plain_table(1), path)
    assert judge_of(endpoint).run(plain_table(1), path).summary.n_valid == 1


def test_a_broken_file_is_refused(endpoint, tmp_path):
    path = tmp_path / "r.jsonl"
    judge_of(endpoint).run(plain_table(2), path)
    line = path.read_bytes().splitlines(keepends=True)[0]
    for content, message in (
        (b"nonsense\n" + line, "line 1: not a judge"),
        (line + b"[1]\n" + line, "line 2: not a judge"),
        (line + line, "line 2: duplicate feature"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_results(path)
        with pytest.raises(ValueError, match=message):
            judge_of(endpoint).run(plain_table(2), path)
        assert path.read_bytes() == content


def make_result(feature, answer):
    fields = answer._asdict() if answer else dict.fromkeys(Answer._fields)
    return JudgeResult(
        feature=feature,
        status="valid" if answer else "malformed",
        **fields,
        reply="",
        model="tiny",
        request_sha256="",
        attempts=1,
        prompt_tokens=None,
        completion_tokens=None,
    )


def test_the_summary_by_depth_and_block():
    """Against means computed by hand."""
    share = {0: [1.0, 0.0, 0.0], 1: [0.5, 0.5, 0.0], 2: [0.0, 0.0, 1.0], 3: [0.0, 0.5, 0.5]}
    table = make_table([make_context(f) for f in range(5)], share_by_block=share)
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
    assert summary.mean_score_by_block == pytest.approx({2: (5 + 0.5 * 2) / 1.5, 5: 2.0, 9: 3.0})
    json.dumps(summary._asdict())
