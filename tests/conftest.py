"""Nothing here touches the network, and shapes in annotations are checked while the tests run."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"

from importlib.metadata import version
from pathlib import Path

from jaxtyping import install_import_hook

PACKAGE = Path(__file__).parents[1] / "sae_lens_route"
# SAELens builds SAE configurations with the metadata as a dict and sets the type after
UNCHECKED = {"saes", "baselines"}
CHECKED = [f"sae_lens_route.{f.stem}" for f in PACKAGE.glob("*.py") if f.stem not in UNCHECKED]
# TransformerLens 2.x pins a beartype too old to read some of these annotations
if int(version("beartype").split(".")[1]) >= 18:
    install_import_hook(CHECKED, "beartype.beartype")

import sae_lens_route  # noqa: E402, F401  (registers the architectures)


def pytest_report_header() -> str:
    """Which of the two environments this is."""
    names = ("torch", "sae-lens", "transformer-lens", "transformers", "datasets")
    return "environment: " + ", ".join(f"{name} {version(name)}" for name in names)
