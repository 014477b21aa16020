"""The command `sae-lens-route`. What is slow to import is imported when a command runs."""

from sae_lens_route.cli.application import app

# in the order of the commands in `--help`
# isort: off
from sae_lens_route.cli import training  # noqa: F401
from sae_lens_route.cli import reading  # noqa: F401
from sae_lens_route.cli import concepts  # noqa: F401
from sae_lens_route.cli import models  # noqa: F401
# isort: on

__all__ = ["app"]
