"""Arguments and options that several commands share."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Units(str, Enum):
    """Units of activations; in a shell, n(x) needs quotation marks."""

    stream = "n(x)"
    x_route = "x_route"


Folder = Annotated[Path, typer.Argument(help="A folder with a saved RouteSAE.")]
Dataset = Annotated[
    str | None,
    typer.Option(help="Held-out text.", show_default="the demo corpus's, for the demo corpus"),
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Tokens to read.")]
EvalTokens = Annotated[int, typer.Option(min=1, help="Held-out tokens to read.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Contexts in one forward pass.")]
UnitsOfActivations = Annotated[
    Units, typer.Option(help="Units of activations; x_route is the paper's.")
]
Device = Annotated[str, typer.Option(help="Device of the model and the SAE.")]
ModelName = Annotated[
    str | None,
    typer.Option(help="Name or folder of the model.", show_default="as the SAE's cfg.json says"),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run code that comes with the model, and take every option of the SAE's cfg.json.",
    ),
]
JudgeUrl = Annotated[
    str | None, typer.Option(help="OpenAI-compatible endpoint; key in OPENAI_API_KEY.")
]
