"""Fields of configuration classes: their help texts, and their values from text or plain YAML."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path, PurePath
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from sae_lens_route.errors import UserError

FILLED_IN = {"sae", "logger", "hook_name", "hook_eval", "metadata", "n_routed_layers"}
FILLED_IN |= {"sae_lens_version", "sae_lens_training_version", "layer_shares"}
FILLED_IN |= {"extend_run", "extended_from"}
"""Fields that a run, or the command that starts it, sets itself."""

_BLOCK_FIELDS = ("routed_blocks", "blocks")


@dataclasses.dataclass(frozen=True)
class ConfigField:
    """One field of a configuration class, as a key of a file and as a command-line option."""

    name: str
    kind: Any
    """The annotation, resolved."""
    default: Any
    help: str

    @property
    def type_name(self) -> str:
        """The type for error messages and help: `int`, `a list of int`, `one of hard, soft`."""
        return " or ".join(_names(self.kind))

    def read(self, value: Any) -> Any:
        """The value with the field's type; text is read as YAML where the field takes no text.

        Blocks may be written as a range, `3-11`.

        Raises:
            UserError: The value is not of the field's type.
        """
        plain = str(value) if isinstance(value, PurePath) else value
        if isinstance(plain, str):
            plain = self._from_text(plain)
        try:
            return _converted(self.kind, plain)
        except TypeError:
            raise UserError(f"{self.name}={value!r}: must be {self.type_name}") from None

    def _from_text(self, text: str) -> Any:
        if NoneType in get_args(self.kind) and text in ("null", "none", "None"):
            return None
        with suppress(TypeError):
            return _converted(self.kind, text)
        if self.name in _BLOCK_FIELDS and (span := re.fullmatch(r"(\d+)-(\d+)", text)):
            return list(range(int(span[1]), int(span[2]) + 1))
        if re.fullmatch(r"[-+]?[\d.]+e[-+]?\d+", text):
            return float(text)  # YAML 1.1 reads 5e-4 as text
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            return text


def fields_of(cls: type) -> dict[str, ConfigField]:
    """The fields of a dataclass that a user sets, by name."""
    texts = _documented_arguments(cls)
    kinds: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        kinds |= inspect.get_annotations(base, eval_str=True)
    return {
        field.name: ConfigField(
            field.name,
            kinds[field.name],
            None if field.default is dataclasses.MISSING else field.default,
            texts.get(field.name, ""),
        )
        for field in dataclasses.fields(cls)
        if field.name not in FILLED_IN
    }


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint at the most similar name, or an empty text."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _documented_arguments(cls: type) -> dict[str, str]:
    """Texts from the `Args:` sections of a dataclass and its bases; the subclass wins."""
    texts: dict[str, str] = {}
    for base in cls.__mro__:
        _, _, section = inspect.cleandoc(base.__doc__ or "").partition("Args:\n")
        for match in re.finditer(
            r"^ {4}(\w+)(?: \([^\n]*?\))?: (.*?)(?=^ {0,4}\w|\Z)", section, re.S | re.M
        ):
            texts.setdefault(match[1], " ".join(match[2].split()))
    return texts


def _converted(kind: Any, value: Any) -> Any:
    """`value` as an instance of an annotation, or a TypeError. Whole floats pass as int (1e8)."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, UnionType):
        for option in args:
            with suppress(TypeError):
                return _converted(option, value)
    elif origin is Literal and value in args:
        return value
    elif origin in (list, tuple) and isinstance(value, list | tuple):
        return origin(_converted(args[0], item) for item in value)
    elif origin is dict and isinstance(value, Mapping):
        return dict(value)
    elif kind is float and type(value) in (int, float):
        return float(value)
    elif kind is int and (type(value) is int or (type(value) is float and value.is_integer())):
        return int(value)
    elif kind is not int and isinstance(kind, type) and origin is None and isinstance(value, kind):
        return value
    raise TypeError


def _names(kind: Any) -> list[str]:
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return [name for option in args if option is not NoneType for name in _names(option)]
    if origin is Literal:
        return [f"one of {', '.join(map(str, args))}"]
    if origin in (list, tuple):
        return [f"a list of {' or '.join(_names(args[0]))}"]
    return ["a mapping" if origin is dict else getattr(kind, "__name__", str(kind))]


def read_config_file(path: str | Path) -> dict[str, Any]:
    """Fields and values of a YAML or JSON file.

    Raises:
        UserError: No such file, or it holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"config={str(path)!r}: no such file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config={str(path)!r}: not YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"config={str(path)!r}: must hold fields and values")
    return {str(name): value for name, value in content.items()}
