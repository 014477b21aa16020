"""The router, RouteSAEs and the baselines; importing this registers them with SAELens.

`SAE.load_from_disk`, `SAE.from_pretrained` and `TrainingSAE.from_dict` then build them by name.
"""

from sae_lens_route.saes.architectures import (
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
from sae_lens_route.saes.crosscoder import (
    Crosscoder,
    CrosscoderConfig,
    TopKCrosscoder,
    TopKCrosscoderConfig,
    TopKTrainingCrosscoder,
    TopKTrainingCrosscoderConfig,
    TrainingCrosscoder,
    TrainingCrosscoderConfig,
)
from sae_lens_route.saes.multi_layer import MultiLayerTopKTrainingConfig, MultiLayerTopKTrainingSAE
from sae_lens_route.saes.registration import register
from sae_lens_route.saes.router import Routing

register(RouteTopKTrainingSAE, RouteTopKTrainingSAEConfig, RouteTopKSAE, RouteTopKSAEConfig)
register(
    RouteJumpReLUTrainingSAE,
    RouteJumpReLUTrainingSAEConfig,
    RouteJumpReLUSAE,
    RouteJumpReLUSAEConfig,
)
register(
    RouteStandardTrainingSAE,
    RouteStandardTrainingSAEConfig,
    RouteStandardSAE,
    RouteStandardSAEConfig,
)
register(RouteGatedTrainingSAE, RouteGatedTrainingSAEConfig, RouteGatedSAE, RouteGatedSAEConfig)
register(RouteBatchTopKTrainingSAE, RouteBatchTopKTrainingSAEConfig)
register(RouteMatryoshkaBatchTopKTrainingSAE, RouteMatryoshkaBatchTopKTrainingSAEConfig)
register(TrainingCrosscoder, TrainingCrosscoderConfig, Crosscoder, CrosscoderConfig)
register(TopKTrainingCrosscoder, TopKTrainingCrosscoderConfig, TopKCrosscoder, TopKCrosscoderConfig)
register(MultiLayerTopKTrainingSAE, MultiLayerTopKTrainingConfig)

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
    "RouteStandardSAE",
    "RouteStandardSAEConfig",
    "RouteStandardTrainingSAE",
    "RouteStandardTrainingSAEConfig",
    "RouteTopKSAE",
    "RouteTopKSAEConfig",
    "RouteTopKTrainingSAE",
    "RouteTopKTrainingSAEConfig",
    "Routing",
    "TopKCrosscoder",
    "TopKCrosscoderConfig",
    "TopKTrainingCrosscoder",
    "TopKTrainingCrosscoderConfig",
    "TrainingCrosscoder",
    "TrainingCrosscoderConfig",
]
