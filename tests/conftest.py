"""Nothing here touches the network, and shapes in annotations are checked while the tests run."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"

from jaxtyping import install_import_hook

install_import_hook("sae_lens_route", "beartype.beartype")

import sae_lens_route  # noqa: E402, F401  (registers the architectures)
