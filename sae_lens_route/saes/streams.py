"""What RouteSAEs and crosscoders share: both read L residual streams of the model per token.

Both check what they are loaded from, too, in the methods that SAELens's loaders call:
`SAE.load_from_disk` and `SAE.from_pretrained` build the configuration, then an SAE on the `meta`
device, and hand the weights to `process_state_dict_for_loading`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_lens.constants import SAE_CFG_FILENAME
from sae_lens.saes.sae import (
    SAE,
    SAEConfig,
    SAEMetadata,
    TrainingSAE,
    TrainingSAEConfig,
    TrainStepInput,
)
from typing_extensions import override

from sae_lens_route.errors import UserError
from sae_lens_route.saes.saved_config import check_saved_config, read_json_object
from sae_lens_route.saes.saved_weights import (
    check_function,
    check_shapes,
    check_values,
    warn_of_narrow,
    write_saved_sae,
)

# What the mixins of this wing are mixed into, so that the type checker knows `super()`.
if TYPE_CHECKING:
    ConfigBase, TrainingConfigBase = SAEConfig, TrainingSAEConfig
    SAEBase, TrainingSAEBase = SAE[Any], TrainingSAE[Any]
else:
    ConfigBase = TrainingConfigBase = SAEBase = TrainingSAEBase = object


@dataclass
class StreamsConfigMixin(ConfigBase):
    """`n_routed_layers`, and the checks that do not depend on how the streams are read.

    Args:
        n_routed_layers: L, how many residual streams are read.
        normalize_activations: "none": every stream is normalized per token already.
    """

    n_routed_layers: int = 9

    # SAELens first passes a saved SAE's metadata as a dict and converts it afterwards, so the type
    # checks of the tests have to leave the constructor out
    __no_type_check__ = True

    def __new__(cls, *args: Any, **values: Any) -> StreamsConfigMixin:
        # values as in the file, before defaults replace what is missing: the sign of a saved SAE
        # is metadata that is no SAEMetadata yet
        if not isinstance(values.get("metadata", SAEMetadata()), SAEMetadata):
            check_saved_config(cls, values)
        return super().__new__(cls)

    @override
    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> Any:
        if config_dict.get("architecture") == cls.architecture():
            check_saved_config(cls, config_dict)
        return super().from_dict(config_dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_routed_layers < 1:
            raise UserError(f"n_routed_layers={self.n_routed_layers}: at least one is needed")
        if self.normalize_activations != "none":
            raise UserError(
                f"normalize_activations={self.normalize_activations!r}: must be 'none', because "
                "every residual stream is normalized per token already"
            )
        if self.reshape_activations != "none":
            raise UserError(
                f"reshape_activations={self.reshape_activations!r}: must be 'none', because "
                "residual streams are read"
            )
        k = getattr(self, "k", None)
        if k is not None and not 0 < k <= self.d_sae:
            raise UserError(f"k={k}: must be between 1 and d_sae={self.d_sae}")


class StreamsSAEMixin(SAEBase):
    """Saving with the digests of the weights, and loading that checks the weights."""

    cfg: Any

    @override
    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        weights = self.state_dict()
        self.process_state_dict_for_saving(weights)
        return write_saved_sae(path, weights, self.cfg.to_dict())

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        # taken out, because it says nothing about weights that change from now on
        digests: Mapping[str, str] | None = vars(self.cfg.metadata).pop("weights_sha256", None)
        warn_of_narrow(check_values(state_dict, digests))
        super().process_state_dict_for_loading(state_dict)
        check_shapes(state_dict, self.state_dict())
        check_function(state_dict, getattr(self.cfg, "rescale_acts_by_decoder_norm", False))


class StreamsTrainingSAEMixin(StreamsSAEMixin, TrainingSAEBase):
    """The same of an SAE in training."""

    @override
    def save_inference_model(self, path: str | Path) -> tuple[Path, Path]:
        weights = self.state_dict()
        self.process_state_dict_for_saving_inference(weights)
        return write_saved_sae(path, weights, self.cfg.get_inference_sae_cfg_dict())

    @override
    def load_weights_from_checkpoint(self, checkpoint_path: Path | str) -> None:
        saved = read_json_object(Path(checkpoint_path) / SAE_CFG_FILENAME)["metadata"]
        self.cfg.metadata.weights_sha256 = saved.get("weights_sha256")
        super().load_weights_from_checkpoint(checkpoint_path)


def require_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a UserError that names the choices unless `value` is one of them."""
    if value not in choices:
        raise UserError(f"{field}={value!r}: must be one of {', '.join(map(repr, choices))}")


def without_unused_mask(step_input: TrainStepInput, cfg: TrainingSAEConfig) -> TrainStepInput:
    """The step without its mask of dead features where the auxiliary loss has a weight of 0.

    The loss is then skipped, not computed and multiplied by 0.
    """
    if getattr(cfg, "aux_loss_coefficient", None) == 0:
        return replace(step_input, dead_neuron_mask=None)
    return step_input
