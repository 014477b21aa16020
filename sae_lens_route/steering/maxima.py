"""The largest activations of features, which relative edits are multiples of."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sae_lens_route.data.reading import Text, activation_batches
from sae_lens_route.errors import UserError
from sae_lens_route.features.table import FeatureTable, require_table_of
from sae_lens_route.models.kinds import LanguageModel
from sae_lens_route.saes.routed import RoutedSAEMixin
from sae_lens_route.saes.units import Units, in_units
from sae_lens_route.steering.edits import FeatureEdit, checked_edits


@torch.no_grad()
def measured_maxima(
    model: LanguageModel,
    sae: RoutedSAEMixin,
    edits: FeatureEdit | Sequence[FeatureEdit],
    text: Text | None = None,
    *,
    max_tokens: int = 20_000,
    units: Units = "n(x)",
) -> dict[int, float]:
    """Largest activation over a text of every feature with a relative edit; nothing without any.

    Args:
        model: The model `sae` was trained on.
        sae: A RouteSAE.
        edits: One or several.
        text: What to read; None is the dataset that the SAE was trained on.
        max_tokens: Tokens to read; token ids are read whole.
        units: Of the maxima.

    Raises:
        UserError: edits that the SAE cannot take, or no text.
    """
    features = _relative(edits, sae)
    if not features:
        return {}
    text = sae.cfg.metadata.dataset_path if text is None else text
    if text is None:
        raise UserError("metadata.dataset_path=None: name a text to measure the maxima on")
    selected = torch.tensor(features, device=sae.W_dec.device)
    maxima = sae.W_dec.new_zeros(len(features))
    for batch in activation_batches(
        model, sae, text, max_tokens=max_tokens, description="measuring maxima"
    ):
        routing = sae.route(batch.of(sae))
        acts = in_units(sae.encode(routing.x_route)[..., selected], routing, sae, units)
        excluded = ~batch.kept.to(acts.device).unsqueeze(-1)
        maxima = torch.maximum(maxima, acts.masked_fill(excluded, 0.0).amax((0, 1)))
    return dict(zip(features, maxima.tolist(), strict=True))


def maxima_of_table(
    table: FeatureTable,
    sae: RoutedSAEMixin,
    edits: FeatureEdit | Sequence[FeatureEdit],
    units: Units = "n(x)",
) -> dict[int, float]:
    """The same from a feature table.

    Raises:
        UserError: edits that the SAE cannot take, or a table of another SAE or in other units.
    """
    require_table_of(sae, table, units)
    return {f: table.profile(f).max_activation for f in _relative(edits, sae)}


def _relative(edits: FeatureEdit | Sequence[FeatureEdit], sae: RoutedSAEMixin) -> list[int]:
    return [edit.feature for edit in checked_edits(edits, sae) if edit.relative]
