"""`python -m sae_lens_route`, the same as the command `sae-lens-route`."""

from sae_lens_route.cli import app

app(prog_name="sae-lens-route")
