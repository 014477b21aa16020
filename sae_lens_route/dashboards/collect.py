"""One pass of the model over a text, and everything of it that a page of features needs.

Every activation above 0 is kept as (feature, token, value), 12 bytes each and twice that while
they are sorted, in addition to 19 bytes per token. With `features` given, only their activations
are kept. Excluded tokens stay visible as context but have no activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lens_route.data.reading import ActivationBatch, Text, activation_batches
from sae_lens_route.errors import UserError
from sae_lens_route.features.active import ActiveEntries, active_entries
from sae_lens_route.features.selection import reading_order
from sae_lens_route.models.kinds import LanguageModel, tokenizer_of
from sae_lens_route.saes.routed import RoutedSAEMixin
from sae_lens_route.saes.router import Routing
from sae_lens_route.saes.units import Units, in_units, require_units

N_TEXTS = 4
TEXT_TOKENS = 96


class Tokens(NamedTuple):
    """All tokens of the text, in order."""

    id: Int[np.ndarray, " tokens"]
    sequence: Int[np.ndarray, " tokens"]
    """Index of the token's context in the text."""
    position: Int[np.ndarray, " tokens"]
    """Position of the token in its context."""
    kept: Bool[np.ndarray, " tokens"]
    """False where a token is excluded."""
    route: Int[np.ndarray, " tokens"]
    weight: Float[np.ndarray, " tokens"]


class RoutedText(NamedTuple):
    """How each token of one context is routed."""

    ids: Int[np.ndarray, " pos"]
    probs: Float[np.ndarray, "pos L"]
    route: Int[np.ndarray, " pos"]


class Collected(NamedTuple):
    """The result of one pass."""

    tokens: Tokens
    active: ActiveEntries
    """Ordered by feature, then by token."""
    mean_probs: Float[np.ndarray, " L"]
    """Route probabilities, mean over the kept tokens."""
    first_texts: list[RoutedText]
    """The first contexts, at most `N_TEXTS` with `TEXT_TOKENS` tokens each."""

    def activations(self, feature: int) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """Tokens on which a feature fires, and how strongly."""
        first, last = np.searchsorted(self.active.feature, [feature, feature + 1])
        return self.active.token[first:last], self.active.value[first:last]

    def features_to_show(self, n: int) -> list[int]:
        """The `n` features to look at first (`features/selection.py`).

        Raises:
            UserError: no feature is active.
        """
        features, first, n_fired = np.unique(
            self.active.feature, return_index=True, return_counts=True
        )
        if not len(features):
            raise UserError("no feature is active on these tokens")
        value = self.active.value
        density = n_fired / self.tokens.kept.sum()
        mean = np.add.reduceat(value.astype(np.float64), first) / n_fired
        order = reading_order(n_fired, density, np.maximum.reduceat(value, first), mean)
        return features[order[:n]].tolist()


@torch.no_grad()
def collect(
    model: LanguageModel,
    sae: RoutedSAEMixin,
    text: Text,
    *,
    features: Sequence[int] | None = None,
    max_tokens: int = 50_000,
    units: Units = "n(x)",
) -> Collected:
    """Run the model once over a text.

    Args:
        model: The model `sae` was trained on, with its tokenizer.
        sae: A RouteSAE.
        text: A dataset, a path for `load_text_dataset`, or token ids with one context per row.
        features: The features whose activations are kept; None keeps all.
        max_tokens: Tokens to read; token ids are read whole.
        units: Of the activations (`saes/units.py`).

    Raises:
        UserError: a feature that the SAE does not have, no tokens, or a model without a tokenizer.
    """
    require_units(units)
    _require_features(features, sae.cfg.d_sae)
    tokenizer_of(model)
    selected = None if features is None else torch.tensor(sorted(set(features)))
    tokens: list[Tokens] = []
    active: list[ActiveEntries] = []
    first_texts: list[RoutedText] = []
    probs_sum = np.zeros(sae.cfg.n_routed_layers)
    n_tokens = n_sequences = 0
    for batch in activation_batches(
        model, sae, text, max_tokens=max_tokens, description="dashboard"
    ):
        routing = sae.route(batch.of(sae))
        tokens.append(_tokens(batch, routing, n_sequences))
        feature_acts = _selected(sae.encode(routing.x_route), selected)
        feature_acts = in_units(feature_acts, routing, sae, units)
        active.append(_active(feature_acts, selected, tokens[-1].kept, n_tokens))
        probs_sum += routing.probs.cpu().double()[batch.kept.cpu()].sum(0).numpy()
        n_more = min(len(batch.tokens), N_TEXTS - len(first_texts))
        first_texts += [_routed_text(batch, routing, row, TEXT_TOKENS) for row in range(n_more)]
        n_tokens += batch.tokens.numel()
        n_sequences += len(batch.tokens)
    n_kept = sum(int(part.kept.sum()) for part in tokens)
    if n_kept == 0:
        raise UserError(
            "no tokens to show: the text is empty, or the SAE's metadata excludes all of it by "
            f"exclude_special_tokens={sae.cfg.metadata.exclude_special_tokens} and "
            f"seqpos_slice={sae.cfg.metadata.seqpos_slice}"
        )
    entries = _joined(active)
    order = np.argsort(entries.feature, kind="stable")
    by_feature = ActiveEntries(*(column[order] for column in entries))
    return Collected(_joined(tokens), by_feature, probs_sum / n_kept, first_texts)


def route_text(model: LanguageModel, sae: RoutedSAEMixin, text: str) -> RoutedText:
    """Routing of a text, with BOS prepended as in training and cut to the training's context.

    Raises:
        UserError: the text has no tokens, or the model no tokenizer.
    """
    tokenizer, metadata = tokenizer_of(model), sae.cfg.metadata
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if metadata.prepend_bos is not False and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    if not ids:
        raise UserError(f"text={text!r} has no tokens")
    (batch,) = activation_batches(model, sae, torch.tensor([ids[: metadata.context_size or None]]))
    with torch.no_grad():
        return _routed_text(batch, sae.route(batch.of(sae)), 0, TEXT_TOKENS)


def _routed_text(batch: ActivationBatch, routing: Routing, row: int, n: int) -> RoutedText:
    parts = (batch.tokens, routing.probs.float(), routing.route)
    return RoutedText(*(part[row, :n].cpu().numpy().copy() for part in parts))


def _tokens(batch: ActivationBatch, routing: Routing, first_sequence: int) -> Tokens:
    rows, positions = np.indices(batch.tokens.shape, dtype=np.int32)
    return Tokens(
        id=batch.tokens.cpu().numpy().ravel().astype(np.int32),
        sequence=rows.ravel() + np.int32(first_sequence),
        position=positions.ravel(),
        kept=batch.kept.cpu().numpy().ravel(),
        route=routing.route.cpu().numpy().ravel().astype(np.int16),
        weight=routing.weight.float().cpu().numpy().ravel(),
    )


def _selected(
    feature_acts: Float[Tensor, "batch pos d_sae"], selected: Int[Tensor, " features"] | None
) -> Float[Tensor, "batch pos features"]:
    if selected is None:
        return feature_acts
    dense = feature_acts.to_dense() if feature_acts.is_sparse else feature_acts
    return dense[..., selected.to(dense.device)]


def _active(
    feature_acts: Float[Tensor, "batch pos features"],
    selected: Int[Tensor, " features"] | None,
    kept: Bool[np.ndarray, " tokens"],
    first_token: int,
) -> ActiveEntries:
    """Active entries of the kept tokens and the selected features, numbered over the whole text."""
    token, feature, value = active_entries(feature_acts)
    here = kept[token]
    token, feature, value = token[here], feature[here], value[here]
    if selected is not None:
        feature = selected.numpy()[feature]
    return ActiveEntries((token + first_token).astype(np.int32), feature.astype(np.int32), value)


_Columns = TypeVar("_Columns", Tokens, ActiveEntries)


def _joined(parts: Sequence[_Columns]) -> _Columns:
    """The parts of each column, concatenated."""
    return type(parts[0])(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _require_features(features: Sequence[int] | None, d_sae: int) -> None:
    if features is not None and not len(features):
        raise UserError("features=[]: name at least one, or pass None for a selection")
    outside = [feature for feature in features or () if not 0 <= feature < d_sae]
    if outside:
        raise UserError(f"features={outside}: the SAE has features 0 to {d_sae - 1}")
