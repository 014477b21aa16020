"""Options of `train`: one for each configuration field, built only when `train` runs.

The fields are those of SAELens's configuration classes, which take seconds to import.
"""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand
from typer.main import get_command

if TYPE_CHECKING:
    from sae_lens_route.config_fields import ConfigField

_PANELS = {"runner": "Run", "sae": "SAE", "logger": "W&B"}

_GIVEN: ContextVar[dict[str, str]] = ContextVar("fields given to the running command")


def given_fields() -> dict[str, str]:
    """The fields given to the running `FieldCommand`, as text."""
    return _GIVEN.get()


class FieldCommand(TyperCommand):
    """A command that also takes every configuration field; `given_fields` returns them.

    Typer passes a command's function only the parameters of its signature.
    """

    def get_params(self, ctx: Any) -> list[Any]:
        return [*super().get_params(ctx), *_options()]

    def invoke(self, ctx: Any) -> Any:
        given = {option.name: ctx.params.pop(option.name) for option in _options()}
        _GIVEN.set({name: text for name, text in given.items() if text is not None})
        return super().invoke(ctx)


@cache
def _options() -> list[Any]:
    """The options as Typer builds them from a signature, in any of its versions."""

    def fields() -> None: ...

    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=option)
        for name, option in _annotations().items()
    ]
    fields.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    fields.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    application = typer.Typer(add_completion=False)
    application.command()(fields)
    return get_command(application).params


def _annotations() -> dict[str, Any]:
    from sae_lens_route.config import config_fields, trainable_architectures

    architectures = trainable_architectures()
    first = next(iter(architectures))
    choice = _option(
        "architecture", "STR", f"One of {', '.join(architectures)}.", first, _PANELS["sae"]
    )
    options: dict[str, Any] = {}
    for architecture in architectures:
        for part, fields in config_fields(architecture).items():
            if part == "sae":
                options.setdefault("architecture", choice)
            for name, field in fields.items():
                options.setdefault(name, _field_option(field, _PANELS[part]))
    return options


def _field_option(field: ConfigField, panel: str) -> Any:
    metavar = field.type_name.removeprefix("one of ").replace(", ", "|")
    return _option(field.name, metavar.upper()[:24], field.help, field.default, panel)


def _option(name: str, metavar: str, text: str, default: object, panel: str) -> Any:
    return Annotated[
        str | None,
        typer.Option(
            f"--{name.replace('_', '-')}",
            metavar=metavar,
            help=text,
            show_default=False if default is None else str(default),
            rich_help_panel=panel,
        ),
    ]
