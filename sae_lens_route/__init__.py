"""RouteSAE for SAELens: sparse autoencoders that read every layer through one router.

Importing this package registers its architectures with SAELens, so that `SAE.load_from_disk` and
`SAE.from_pretrained` know them.
"""

from sae_lens_route.baselines import (
    Crosscoder,
    CrosscoderConfig,
    MultiLayerTopKTrainingConfig,
    MultiLayerTopKTrainingSAE,
    TopKCrosscoder,
    TopKCrosscoderConfig,
    TopKTrainingCrosscoder,
    TopKTrainingCrosscoderConfig,
    TrainingCrosscoder,
    TrainingCrosscoderConfig,
)
from sae_lens_route.router import Routing
from sae_lens_route.runner import RouteSAERunnerConfig, RouteSAETrainingRunner
from sae_lens_route.saes import (
    RouteBatchTopKTrainingSAE,
    RouteBatchTopKTrainingSAEConfig,
    RouteGatedSAE,
    RouteGatedSAEConfig,
    RouteGatedTrainingSAE,
    RouteGatedTrainingSAEConfig,
    RouteJumpReLUSAE,
    RouteJumpReLUSAEConfig,
    RouteJumpReLUTrainingSAE,
    RouteJumpReLUTrainingSAEConfig,
    RouteMatryoshkaBatchTopKTrainingSAE,
    RouteMatryoshkaBatchTopKTrainingSAEConfig,
    RouteStandardSAE,
    RouteStandardSAEConfig,
    RouteStandardTrainingSAE,
    RouteStandardTrainingSAEConfig,
    RouteTopKSAE,
    RouteTopKSAEConfig,
    RouteTopKTrainingSAE,
    RouteTopKTrainingSAEConfig,
)
from sae_lens_route.splice import RouteSAETransformer, attach
from sae_lens_route.sweep import SweepEntry, SweepRunner

__version__ = "0.1.0"

__all__ = [
    "Crosscoder",
    "CrosscoderConfig",
    "MultiLayerTopKTrainingConfig",
    "MultiLayerTopKTrainingSAE",
    "RouteBatchTopKTrainingSAE",
    "RouteBatchTopKTrainingSAEConfig",
    "RouteGatedSAE",
    "RouteGatedSAEConfig",
    "RouteGatedTrainingSAE",
    "RouteGatedTrainingSAEConfig",
    "RouteJumpReLUSAE",
    "RouteJumpReLUSAEConfig",
    "RouteJumpReLUTrainingSAE",
    "RouteJumpReLUTrainingSAEConfig",
    "RouteMatryoshkaBatchTopKTrainingSAE",
    "RouteMatryoshkaBatchTopKTrainingSAEConfig",
    "RouteSAERunnerConfig",
    "RouteSAETrainingRunner",
    "RouteSAETransformer",
    "RouteStandardSAE",
    "RouteStandardSAEConfig",
    "RouteStandardTrainingSAE",
    "RouteStandardTrainingSAEConfig",
    "RouteTopKSAE",
    "RouteTopKSAEConfig",
    "RouteTopKTrainingSAE",
    "RouteTopKTrainingSAEConfig",
    "Routing",
    "SweepEntry",
    "SweepRunner",
    "TopKCrosscoder",
    "TopKCrosscoderConfig",
    "TopKTrainingCrosscoder",
    "TopKTrainingCrosscoderConfig",
    "TrainingCrosscoder",
    "TrainingCrosscoderConfig",
    "attach",
]
