"""Records survive JSON with their types."""

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest

from sae_lens_route.records import as_json, plain, typed


class Point(NamedTuple):
    x: int
    y: float | None = None


class Line(NamedTuple):
    start: Point
    end: Point


@dataclass(frozen=True)
class Drawing:
    shapes: list[Point | Line]
    sizes: dict[int, float | None] | None
    origin: Point | None
    path: tuple[Point, ...]
    note: Any = None


def through_json(kind: Any, value: Any) -> Any:
    return typed(kind, json.loads(json.dumps(plain(value))))


@pytest.mark.parametrize(
    "drawing",
    [
        Drawing(
            [Point(1, 2.0), Line(Point(1), Point(2))], {3: 0.5, 4: None}, Point(5), (Point(6),)
        ),
        Drawing([], None, None, (), note={"3": [1]}),
    ],
)
def test_records_are_read_as_they_were_written(drawing: Drawing) -> None:
    assert through_json(Drawing, drawing) == drawing
    assert through_json(list[Drawing], [drawing]) == [drawing]


class Dot(NamedTuple):
    x: int
    size: float
    color: str | None = None


def test_fields_that_earlier_files_lack_get_their_default() -> None:
    assert typed(Point | Dot, {"x": 1, "size": 2.0}) == Dot(1, 2.0)
    assert typed(list[Point | Dot], [{"x": 1}]) == [Point(1)]
    assert typed(Point | Line, {"y": 1.0}) == {"y": 1.0}


def test_plain_values_are_those_of_json() -> None:
    assert plain(Line(Point(1), Point(2, 3.0))) == {
        "start": {"x": 1, "y": None},
        "end": {"x": 2, "y": 3.0},
    }
    assert plain((1, [Point(2)])) == [1, [{"x": 2, "y": None}]]


def test_a_record_may_be_a_list_of_its_fields() -> None:
    assert typed(tuple[Point, ...], [[1, 2.0], [3, None]]) == (Point(1, 2.0), Point(3))


def test_other_fields_are_errors() -> None:
    with pytest.raises(KeyError):
        typed(Point, {"z": 1})
    with pytest.raises(TypeError):
        typed(Point, {"y": 1.0})


def test_lists_of_numbers_are_one_line_and_everything_is_read_back():
    values = {
        "numbers": [1, -2.5, 1e-07, 3.0],
        "text": ["1, 2", "[3]"],
        "rows": [{"a": [1], "b": []}, [[1, 2], [3]]],
        "mixed": [1, None, "x"],
        "note": "a [1,\n 2] in text",
    }
    text = as_json(values)
    assert json.loads(text) == values
    assert ' "numbers": [1, -2.5, 1e-07, 3.0],\n' in text and "[1, 2],\n" in text
