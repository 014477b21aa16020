"""The prompt shows a feature's strongest contexts; only an answer in its format is valid."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.feature_tables import make_context
from support.judge import answer_strategy, as_text

from sae_lens_route.features.judge_prompt import (
    CATEGORIES,
    Answer,
    MalformedAnswer,
    parse_answer,
    prompt,
)


def test_the_prompt_shows_the_strongest_contexts_as_one_json_line_each():
    contexts = [make_context(0, token=f"t{i}", activation=float(i)) for i in range(80)]
    contexts[79] = contexts[79]._replace(text='two\nlines "quoted" <ACTIVATED>é</ACTIVATED>')
    lines = prompt(contexts).splitlines()[-64:]
    shown = [json.loads(line) for line in lines]
    assert [s["activation"] for s in shown] == [float(i) for i in range(79, 15, -1)]
    assert shown[0]["context"] == contexts[79].text
    assert "é" in lines[0]
    assert len(prompt(contexts, 5).splitlines()) == len(prompt(contexts).splitlines()) - 59


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
