"""Values of fields, from text and from plain YAML."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from sae_lens_route.config_fields import ConfigField, did_you_mean, fields_of
from sae_lens_route.errors import UserError


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (int, "3", 3),
        (int, 1e8, 100_000_000),
        (int, "1e8", 100_000_000),
        (float, "5e-4", 5e-4),
        (float, 1, 1.0),
        (bool, "true", True),
        (bool | int, "3", 3),
        (str, "null", "null"),
        (str, "3", "3"),
        (str, Path("a/b"), "a/b"),
        (str | None, "null", None),
        (int | None, "none", None),
        (list[int] | None, "[3, 4]", [3, 4]),
        (bool | list[int], "[3]", [3]),
        (list[str], "[a.b, c]", ["a.b", "c"]),
        (tuple[int | None, ...], "[1, null]", (1, None)),
        (tuple[int | None, ...], [1, 12], (1, 12)),
        (Literal["none", "mean"], "none", "none"),
        (int | Literal["bos"] | None, "bos", "bos"),
        (int | Literal["bos"] | None, "7", 7),
        (dict[str, Any], "{a: 1}", {"a": 1}),
    ],
)
def test_values(kind, value, expected):
    read = ConfigField("field", kind, None, "").read(value)
    assert read == expected and type(read) is type(expected)


def test_blocks_may_be_a_range_and_other_lists_not():
    assert ConfigField("routed_blocks", list[int] | None, None, "").read("3-6") == [3, 4, 5, 6]
    with pytest.raises(UserError):
        ConfigField("matryoshka_widths", list[int], None, "").read("64-128")


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (int, "many", "int"),
        (int, True, "int"),
        (int, 2.5, "int"),
        (float, "[1]", "float"),
        (bool, 1, "bool"),
        (list[int] | None, 3, "a list of int"),
        (list[int], [1, "a"], "a list of int"),
        (Literal["hard", "soft"], "softly", "one of hard, soft"),
        (bool | list[int], "x", "bool or a list of int"),
        (int, "[", "int"),
    ],
)
def test_other_types_are_refused_with_field_and_value(kind, value, expected):
    with pytest.raises(UserError) as error:
        ConfigField("field", kind, None, "").read(value)
    assert str(error.value) == f"field={value!r}: must be {expected}"


@dataclass
class Base:
    """A base.

    Args:
        k (int): Features
            per token.
        seed: Of the base.
    """

    k: int
    seed: int = 0
    hook_name: str = ""


@dataclass
class Derived(Base):
    """A subclass.

    Args:
        seed: Of the subclass.

    Raises:
        ValueError: never.
    """

    seed: int = 1


def test_fields_have_the_texts_of_their_classes():
    fields = fields_of(Derived)
    assert list(fields) == ["k", "seed"]  # `hook_name` is filled in
    assert (fields["k"].help, fields["k"].default) == ("Features per token.", None)
    assert (fields["seed"].help, fields["seed"].default) == ("Of the subclass.", 1)


def test_hints():
    assert did_you_mean("routed_block", ["k", "routed_blocks"]) == "; did you mean 'routed_blocks'?"
    assert did_you_mean("qq", ["k", "routed_blocks"]) == ""
