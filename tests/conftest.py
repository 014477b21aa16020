"""Nothing here touches the network, and shapes in annotations are checked while the tests run."""

import os
from tempfile import TemporaryDirectory

MODULES = TemporaryDirectory()  # where transformers puts the code of models that are trusted
os.environ["HF_MODULES_CACHE"] = MODULES.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"

from importlib.metadata import version
from pathlib import Path

from jaxtyping import install_import_hook

PACKAGE = Path(__file__).parents[1] / "sae_lens_route"
CHECKED = ["sae_lens_route"]
# TransformerLens 2.x pins a beartype too old to read some of these annotations
if int(version("beartype").split(".")[1]) >= 18:
    install_import_hook(CHECKED, "beartype.beartype")


import pytest
import torch
from sae_lens.load_model import HookedProxyLM
from support.architectures import STEP_TOKENS, STEPS, training_config
from support.small import TINYLLAMA, TINYLLAMA_WIDTH, small_config, tokens_dataset
from support.splice import hf_model, hooked_model, tokenizer

import sae_lens_route  # noqa: F401  (registers the architectures)
from sae_lens_route.models.load import load_model
from sae_lens_route.training.runner import RouteSAETrainingRunner


def pytest_report_header() -> str:
    """Which of the two environments this is."""
    names = ("torch", "sae-lens", "transformer-lens", "transformers", "datasets")
    return "environment: " + ", ".join(f"{name} {version(name)}" for name in names)


@pytest.hookimpl(tryfirst=True)  # before the fixtures
def pytest_runtest_setup() -> None:
    """What a test draws does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def make_model(tmp_path_factory):
    """`make_model(kind, n_layers)`: a small random model in float64, made once."""
    made = {}

    def make(kind, n_layers=8):
        if (kind, n_layers) in made:
            return made[kind, n_layers]
        family, style = kind.split("-")
        if family == "hooked":
            model = hooked_model(style, n_layers=n_layers)
            model.set_tokenizer(tokenizer(), default_padding_side="left")
        elif family == "proxy":
            model = HookedProxyLM(hf_model(style, n_layers), tokenizer())
        else:
            from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

            folder = tmp_path_factory.mktemp("model")
            hf_model(style, n_layers).save_pretrained(folder)
            model = SAETransformerBridge.boot_transformers(
                str(folder), tokenizer=tokenizer(), dtype=torch.float64
            )
        made[kind, n_layers] = model
        return model

    return make


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """For fixtures of every scope: the last bits of a sum depend on the number of threads.

    Tensors this small also take much longer on several threads than on one.
    """
    torch.set_num_threads(1)


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def tinyllama():
    return load_model(TINYLLAMA)


@pytest.fixture(scope="session")
def make_trained(tinyllama, tmp_path_factory):
    """`make_trained(architecture)`: the SAE after 50 steps on the tiny Llama, and its folder."""
    made = {}

    def make(architecture):
        if architecture not in made:
            folder = tmp_path_factory.mktemp(architecture) / "sae"
            cfg = small_config(
                folder, training_tokens=STEPS * STEP_TOKENS, lr=2e-3, lr_warm_up_steps=0
            )
            cfg.sae = training_config(architecture, d_in=TINYLLAMA_WIDTH, d_sae=96)
            runner = RouteSAETrainingRunner(cfg, tokens_dataset(n_contexts=320), tinyllama)
            made[architecture] = runner.run(), folder
        return made[architecture]

    return make
