"""Typed records (dataclasses and NamedTuples) as the plain values of JSON, and back."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints


def plain(value: Any) -> Any:
    """Records as dictionaries by field name, and tuples as lists, at any depth."""
    if is_dataclass(value):
        value = vars(value)
    elif hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {name: plain(field) for name, field in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def as_json(value: Any) -> str:
    """Records as JSON that people read and compare: indented, but a list of numbers is one line."""
    text = json.dumps(plain(value), indent=1)
    numbers = re.compile(r"\[\s+(-?\d[^\[\]{}\":]*?)\s+\]")
    return numbers.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


def typed(kind: Any, value: Any) -> Any:
    """A value of the type `kind` from its plain form, such as JSON: the reverse of `plain`.

    Keys of a dict, which are text in JSON, get their type again. Of several records in a union, the
    one whose fields the value has is taken; those of a NamedTuple with a default may be missing. A
    record may also be a list of its fields.
    """
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return typed(next((option for option in args if _fits(option, value)), Any), value)
    if _is_record(kind):
        kinds = get_type_hints(kind)
        fields = value if isinstance(value, Mapping) else dict(zip(kinds, value, strict=True))
        return kind(**{name: typed(kinds[name], field) for name, field in fields.items()})
    if origin is dict:
        return {args[0](name): typed(args[1], field) for name, field in value.items()}
    if origin in (list, tuple):
        return origin(typed(args[0], each) for each in value)
    return value


def _is_record(kind: Any) -> bool:
    return is_dataclass(kind) or hasattr(kind, "_fields")


def _fits(kind: Any, value: Any) -> bool:
    if _is_record(kind):
        if not isinstance(value, Mapping):
            return False
        fields, optional = get_type_hints(kind).keys(), getattr(kind, "_field_defaults", {}).keys()
        return fields - optional <= value.keys() <= fields
    return get_origin(kind) is type(value)
