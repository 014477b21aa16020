"""The six RouteSAE architectures, each a SAELens class with the router mixed in.

| architecture               | sparsity                          | saved as         |
|----------------------------|-----------------------------------|------------------|
| route_topk                 | k features per token, the paper's | route_topk       |
| route_batchtopk            | k per token on average            | route_jumprelu   |
| route_matryoshka_batchtopk | the same, nested dictionaries     | route_jumprelu   |
| route_jumprelu             | L0 penalty, trained thresholds    | route_jumprelu   |
| route_standard             | ReLU and an L1 penalty            | route_standard   |
| route_gated                | a gate with an L1 penalty         | route_gated      |

With `n_routed_layers=1` there is nothing to choose, p is 1, and the SAE is the base class on n(x)
of that block: the single-layer baselines.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAEConfig
from sae_lens.saes.gated_sae import (
    GatedSAE,
    GatedSAEConfig,
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
)
from sae_lens.saes.jumprelu_sae import (
    JumpReLUSAE,
    JumpReLUSAEConfig,
    JumpReLUTrainingSAEConfig,
)
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.saes.standard_sae import (
    StandardSAE,
    StandardSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
)
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

from sae_lens_route.saes.asynchronous import (
    AsynchronousBatchTopK,
    AsynchronousJumpReLU,
    AsynchronousMatryoshkaBatchTopK,
)
from sae_lens_route.saes.routed import RoutedSAEMixin, RoutedTrainingSAEMixin
from sae_lens_route.saes.routed_config import RoutedConfigMixin, RoutedTrainingConfigMixin
from sae_lens_route.saes.sparse_topk import SparseTopKTrainingConfig, SparseTopKTrainingSAE


@dataclass
class RouteTopKSAEConfig(RoutedConfigMixin, TopKSAEConfig):
    """A RouteSAE with TopK, the paper's model."""

    k: int = 64


class RouteTopKSAE(RoutedSAEMixin, TopKSAE):
    """A RouteSAE with TopK, for inference."""

    cfg: RouteTopKSAEConfig  # type: ignore[assignment]


@dataclass(kw_only=True)
class RouteTopKTrainingSAEConfig(RoutedTrainingConfigMixin, SparseTopKTrainingConfig):
    """Training configuration of a RouteSAE with TopK; the defaults are the paper's."""

    k: int = 64
    aux_loss_coefficient: float = 0.0
    rescale_acts_by_decoder_norm: bool = False


class RouteTopKTrainingSAE(RoutedTrainingSAEMixin, SparseTopKTrainingSAE):
    """A RouteSAE with TopK, for training."""

    cfg: RouteTopKTrainingSAEConfig  # type: ignore[assignment]


@dataclass
class RouteJumpReLUSAEConfig(RoutedConfigMixin, JumpReLUSAEConfig):
    """A RouteSAE with JumpReLU; batchtopk and matryoshka_batchtopk are saved as one too."""


class RouteJumpReLUSAE(RoutedSAEMixin, JumpReLUSAE):
    """A RouteSAE with JumpReLU, for inference."""

    cfg: RouteJumpReLUSAEConfig  # type: ignore[assignment]


@dataclass(kw_only=True)
class RouteJumpReLUTrainingSAEConfig(RoutedTrainingConfigMixin, JumpReLUTrainingSAEConfig):
    """Training configuration of a RouteSAE with JumpReLU.

    Args:
        l0_coefficient: weight of the L0 penalty relative to the loss. SAELens's 1.0 is relative to
            the squared error; relative to NormMSE the same weight is 1/d.
        jumprelu_init_threshold: None means 0.05 * sqrt(d_in), which is 0.05 for inputs scaled to
            norm 1.
        jumprelu_bandwidth: None means 0.05 * sqrt(d_in) too.
    """

    l0_coefficient: float = 0.01
    jumprelu_init_threshold: float | None = None  # type: ignore[assignment]
    jumprelu_bandwidth: float | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        scaled = 0.05 * self.d_in**0.5
        if self.jumprelu_init_threshold is None:
            self.jumprelu_init_threshold = scaled
        if self.jumprelu_bandwidth is None:
            self.jumprelu_bandwidth = scaled
        super().__post_init__()


class RouteJumpReLUTrainingSAE(RoutedTrainingSAEMixin, AsynchronousJumpReLU):
    """A RouteSAE with JumpReLU, for training."""

    cfg: RouteJumpReLUTrainingSAEConfig  # type: ignore[assignment]


@dataclass
class RouteStandardSAEConfig(RoutedConfigMixin, StandardSAEConfig):
    """A RouteSAE with ReLU."""


class RouteStandardSAE(RoutedSAEMixin, StandardSAE):
    """A RouteSAE with ReLU, for inference."""

    cfg: RouteStandardSAEConfig  # type: ignore[assignment]


@dataclass(kw_only=True)
class RouteStandardTrainingSAEConfig(RoutedTrainingConfigMixin, StandardTrainingSAEConfig):
    """Training configuration of a RouteSAE with ReLU and an L1 penalty.

    Args:
        l1_coefficient: weight of the L1 penalty. Under the normalized loss the penalty is divided
            by the mean norm of x_route, so the weight does not depend on d.
        l1_warm_up_steps: steps over which the weight rises from 0.
        lp_norm: which norm of the features the penalty takes; 1 is L1.
    """

    l1_coefficient: float = 0.3


class RouteStandardTrainingSAE(RoutedTrainingSAEMixin, StandardTrainingSAE):
    """A RouteSAE with ReLU, for training."""

    cfg: RouteStandardTrainingSAEConfig  # type: ignore[assignment]


@dataclass
class RouteGatedSAEConfig(RoutedConfigMixin, GatedSAEConfig):
    """A RouteSAE with a gated encoder."""


class RouteGatedSAE(RoutedSAEMixin, GatedSAE):
    """A RouteSAE with a gated encoder, for inference."""

    cfg: RouteGatedSAEConfig  # type: ignore[assignment]


@dataclass(kw_only=True)
class RouteGatedTrainingSAEConfig(RoutedTrainingConfigMixin, GatedTrainingSAEConfig):
    """Training configuration of a RouteSAE with a gated encoder.

    Args:
        l1_coefficient: weight of the L1 penalty on the gate, in the units of `route_standard`.
        l1_warm_up_steps: steps over which the weight rises from 0.
    """

    l1_coefficient: float = 0.3


class RouteGatedTrainingSAE(RoutedTrainingSAEMixin, GatedTrainingSAE):
    """A RouteSAE with a gated encoder, for training."""

    cfg: RouteGatedTrainingSAEConfig  # type: ignore[assignment]


@dataclass(kw_only=True)
class RouteBatchTopKTrainingSAEConfig(RoutedTrainingConfigMixin, BatchTopKTrainingSAEConfig):
    """Training configuration of a RouteSAE with BatchTopK."""

    k: float = 64  # type: ignore[assignment]
    aux_loss_coefficient: float = 0.0
    rescale_acts_by_decoder_norm: bool = False


class RouteBatchTopKTrainingSAE(RoutedTrainingSAEMixin, AsynchronousBatchTopK):
    """A RouteSAE with BatchTopK, for training; saved as `route_jumprelu`."""

    cfg: RouteBatchTopKTrainingSAEConfig  # type: ignore[assignment]


@dataclass(kw_only=True)
class RouteMatryoshkaBatchTopKTrainingSAEConfig(
    RoutedTrainingConfigMixin, MatryoshkaBatchTopKTrainingSAEConfig
):
    """Training configuration of a RouteSAE with nested BatchTopK dictionaries.

    Args:
        matryoshka_widths: sizes of the nested dictionaries, ascending; an empty list means an
            eighth, a quarter, a half and all of d_sae.
    """

    k: float = 64  # type: ignore[assignment]
    aux_loss_coefficient: float = 0.0
    rescale_acts_by_decoder_norm: bool = False
    matryoshka_widths: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.matryoshka_widths:
            self.matryoshka_widths = [max(1, self.d_sae // n) for n in (8, 4, 2, 1)]


class RouteMatryoshkaBatchTopKTrainingSAE(RoutedTrainingSAEMixin, AsynchronousMatryoshkaBatchTopK):
    """A RouteSAE with nested BatchTopK dictionaries, for training; saved as `route_jumprelu`."""

    cfg: RouteMatryoshkaBatchTopKTrainingSAEConfig  # type: ignore[assignment]
