"""RouteSAE for SAELens: sparse autoencoders that read every layer through one router.

Importing this package registers its architectures with SAELens, so that `SAE.load_from_disk` and
`SAE.from_pretrained` know them.
"""

from sae_lens_route.router import Routing
from sae_lens_route.runner import RouteSAERunnerConfig, RouteSAETrainingRunner
from sae_lens_route.saes import (
    RouteTopKSAE,
    RouteTopKSAEConfig,
    RouteTopKTrainingSAE,
    RouteTopKTrainingSAEConfig,
)
from sae_lens_route.splice import RouteSAETransformer, attach

__version__ = "0.1.0"

__all__ = [
    "RouteSAERunnerConfig",
    "RouteSAETrainingRunner",
    "RouteSAETransformer",
    "RouteTopKSAE",
    "RouteTopKSAEConfig",
    "RouteTopKTrainingSAE",
    "RouteTopKTrainingSAEConfig",
    "Routing",
    "attach",
]
