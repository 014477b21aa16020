"""RouteSAE for SAELens: sparse autoencoders that read all layers of a model through one router.

Importing this package makes SAELens know its architectures, in whichever order the two are
imported, so that `SAE.load_from_disk` and `SAE.from_pretrained` load them. The names below are
imported on first use, to keep the import itself fast. All SAE classes are in `sae_lens_route.saes`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sae_lens_route.registration_hook import register_with_sae_lens

if TYPE_CHECKING:
    from sae_lens_route.config import RouteSAERunnerConfig
    from sae_lens_route.dashboards import write_dashboard
    from sae_lens_route.data.reading import activation_batches
    from sae_lens_route.errors import UserError
    from sae_lens_route.evals.evaluate import evaluate
    from sae_lens_route.features.contexts import find_contexts
    from sae_lens_route.models.load import load_model
    from sae_lens_route.saes import RouteTopKTrainingSAEConfig
    from sae_lens_route.saes.saved import load_saved_sae
    from sae_lens_route.splice import RouteSAETransformer, attach
    from sae_lens_route.splice.language_model import load_model_of
    from sae_lens_route.steering import FeatureEdit, steer
    from sae_lens_route.training.entries import SweepEntry
    from sae_lens_route.training.runner import RouteSAETrainingRunner
    from sae_lens_route.training.sweep import SweepRunner

__version__ = "0.1.0"

__all__ = [
    "FeatureEdit",
    "RouteSAERunnerConfig",
    "RouteSAETrainingRunner",
    "RouteSAETransformer",
    "RouteTopKTrainingSAEConfig",
    "SweepEntry",
    "SweepRunner",
    "UserError",
    "activation_batches",
    "attach",
    "evaluate",
    "find_contexts",
    "load_model",
    "load_model_of",
    "load_saved_sae",
    "steer",
    "write_dashboard",
]

_MODULE_OF = {
    "FeatureEdit": "steering",
    "RouteSAERunnerConfig": "config",
    "RouteSAETrainingRunner": "training.runner",
    "RouteSAETransformer": "splice",
    "RouteTopKTrainingSAEConfig": "saes",
    "SweepEntry": "training.entries",
    "SweepRunner": "training.sweep",
    "UserError": "errors",
    "activation_batches": "data.reading",
    "attach": "splice",
    "evaluate": "evals.evaluate",
    "find_contexts": "features.contexts",
    "load_model": "models.load",
    "load_model_of": "splice.language_model",
    "load_saved_sae": "saes.saved",
    "steer": "steering",
    "write_dashboard": "dashboards",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # looked up each time, so that a reloaded module's class is the one returned
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_sae_lens()
