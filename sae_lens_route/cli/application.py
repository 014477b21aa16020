"""The Typer application: its global options and how errors end.

A mistake a user can fix (`UserError`) ends in one line on standard error and exit code 2, Ctrl-C in
exit code 130. Every other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sae_lens_route.errors import UserError


class _Commands(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)  # older versions of Typer sort them

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            if ctx.params["debug"]:
                raise
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            raise _stopped() from error
        except Exception as error:
            # what SAELens makes of Ctrl-C; by name, because importing its class takes seconds
            if type(error).__name__ != "InterruptedException":
                raise
            raise _stopped() from error


def _stopped() -> typer.Exit:
    typer.echo("stopped", err=True)
    return typer.Exit(130)


app = typer.Typer(
    cls=_Commands,
    help="Train, evaluate and interpret RouteSAEs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _global_options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of user errors too.")
    ] = False,
) -> None:
    """`debug` is read where errors are handled."""


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print aligned columns: the first to the left, the others to the right."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for first, *rest in cells:
        aligned = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        typer.echo("  ".join([first.ljust(widths[0]), *aligned]))
