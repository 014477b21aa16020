"""Edits of features, and the hook function that applies them.

A feature is edited at the routed hook. There a token's routed activation x_route, at the token's
own block (see `splice/hook.py`), becomes

    z = encode(x_route),   z' = z with the edits,   x_route  <-  x_route + decode(z') - decode(z).

Only the difference is added, so the part that the SAE does not reconstruct stays in the model, and
a token whose features the edits leave unchanged is bit-identical. With `use_error_term=False`
steered tokens become decode(z') instead, which loses that part.

**Units.** Values are feature activations as the SAE sees them, on the routed activation scaled by
its p: a token with p = 0.5 has half the activation of the same token with p = 1. The residual
stream gets the value times `scale / p`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Bool, Float
from sae_lens.saes.sae import SAE
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from sae_lens_route.errors import UserError

EditMode = Literal["set", "add", "scale", "ablate"]

_WORDS = {"set": "set to {}", "add": "plus {}", "scale": "times {}", "ablate": "ablated"}


def default_clamp(d_in: int) -> float:
    """The paper's clamp to 20 as a share of sqrt(d_in), the norm of a normalized activation."""
    return 20.0 * (d_in / 2048) ** 0.5


@dataclass(frozen=True)
class FeatureEdit:
    """An edit of one feature.

    Args:
        feature: Index of the feature, below d_sae.
        mode: "set" makes the activation `value` on every steered token, active there or not (the
            paper's clamp); "add" adds `value`; "scale" multiplies by it; "ablate" makes it 0.
        value: Value in activation units, or the factor of "scale"; negative steers away. None for
            "ablate".

    Raises:
        UserError: a feature, mode or value that is not possible.
    """

    feature: int
    mode: EditMode = "set"
    value: int | float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.feature, bool) or not isinstance(self.feature, int) or self.feature < 0:
            raise UserError(f"feature={self.feature!r}: must be an index, 0 or more")
        if self.mode not in _WORDS:
            raise UserError(f"mode={self.mode!r}: must be one of {', '.join(_WORDS)}")
        if self.mode == "ablate":
            if self.value not in (None, 0):
                raise UserError(f"value={self.value!r}: mode='ablate' takes no value, it sets to 0")
        elif (
            isinstance(self.value, bool)
            or not isinstance(self.value, int | float)
            or not math.isfinite(self.value)
        ):
            raise UserError(f"value={self.value!r}: mode={self.mode!r} needs a finite number")

    @classmethod
    def parse(cls, text: str) -> FeatureEdit:
        """An edit written as FEATURE:MODE:VALUE, such as "17:set:5", "17:scale:-1" or "17:ablate".

        Raises:
            UserError: another form, or a feature, mode or value that is not possible.
        """
        feature, mode, value = (*text.split(":", 2), "", "")[:3]
        try:
            if mode not in _WORDS:
                raise UserError(f"mode={mode!r}: must be one of {', '.join(_WORDS)}")
            number = float(value) if value else None
            return cls(int(feature), cast(EditMode, mode), number)
        except ValueError as error:
            raise UserError(
                f"edit={text!r}: must be FEATURE:MODE:VALUE, such as 17:set:5, 17:add:2, "
                f"17:scale:0.5 or 17:ablate ({error})"
            ) from error

    def __str__(self) -> str:
        value = 0.0 if self.value is None else self.value
        return f"feature {self.feature} {_WORDS[self.mode].format(f'{value:g}')}"

    def apply(self, acts: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """The feature's activations after the edit."""
        if self.mode == "add":
            return acts + cast(float, self.value)
        if self.mode == "scale":
            return acts * cast(float, self.value)
        return torch.full_like(acts, self.value or 0.0)  # "set" and "ablate"


def edit_features(
    sae: SAE[Any],
    edits: FeatureEdit | Sequence[FeatureEdit],
    positions: Sequence[int] | Bool[Tensor, ...] | None = None,
    *,
    use_error_term: bool = True,
) -> Callable[..., Float[Tensor, "batch pos d"]]:
    """A hook function that edits features, for `run_with_hooks` at `sae.cfg.metadata.hook_name`.

        with attach(model, sae):
            hooks = [(sae.cfg.metadata.hook_name, edit_features(sae, FeatureEdit(17, "set", 5)))]
            logits = model.run_with_hooks(tokens, fwd_hooks=hooks)

    The function is stateless and differentiable. During generation, `positions` count from the
    start of each pass, not of the text.

    Args:
        sae: The SAE at that hook.
        edits: One or several, at most one per feature.
        positions: Tokens to edit: indices of positions, or a mask `[pos]` or `[batch, pos]`; None
            for all. The others are bit-identical.
        use_error_term: Add only the difference that the edits make; otherwise the edited
            reconstruction replaces the activation.

    Raises:
        UserError: edits that the SAE cannot take; during a pass, positions outside of it.
    """
    edits = checked_edits(edits, sae)

    def hook_function(
        x_route: Float[Tensor, "batch pos d"], hook: HookPoint | None = None
    ) -> Float[Tensor, "batch pos d"]:
        mask = None if positions is None else _position_mask(positions, x_route)
        return apply_edits(sae, edits, x_route, mask, use_error_term).x_route

    return hook_function


class Edited(NamedTuple):
    """A routed activation after n edits."""

    x_route: Float[Tensor, "batch pos d"]
    before: Float[Tensor, "batch pos n"]
    """Activations of the n edited features."""
    after: Float[Tensor, "batch pos n"]
    """The same after the edits; equal to `before` on tokens that are not steered."""


def apply_edits(
    sae: SAE[Any],
    edits: Sequence[FeatureEdit],
    x_route: Float[Tensor, "batch pos d"],
    mask: Bool[Tensor, ...] | None,
    use_error_term: bool,
) -> Edited:
    """Apply edits at the tokens of `mask`, or at all tokens if it is None."""
    acts = sae.encode(x_route)
    features = torch.tensor([edit.feature for edit in edits], device=acts.device)
    before = acts[..., features]
    after = torch.stack([e.apply(before[..., i]) for i, e in enumerate(edits)], dim=-1)
    if mask is not None:
        after = torch.where(mask.unsqueeze(-1), after, before)
    result = sae.decode(acts.index_copy(-1, features, after))
    if use_error_term:
        result = x_route + (result - sae.decode(acts))
        mask = (after != before).any(dim=-1)  # without a difference: bit-identical
    if mask is not None:
        result = torch.where(mask.unsqueeze(-1), result, x_route)
    return Edited(result, before, after)


def _position_mask(
    positions: Sequence[int] | Bool[Tensor, ...], x_route: Float[Tensor, "batch pos d"]
) -> Bool[Tensor, "batch pos"]:
    shape = x_route.shape[:-1]
    if isinstance(positions, Tensor) and positions.dtype == torch.bool:
        try:
            return positions.to(x_route.device).expand(shape)
        except RuntimeError as error:
            raise UserError(
                f"positions: a mask {list(positions.shape)} does not fit a pass {list(shape)}"
            ) from error
    n = shape[1]
    outside = [int(p) for p in positions if not -n <= p < n]
    if outside:
        raise UserError(f"positions={outside}: the pass has {n} tokens")
    mask = torch.zeros(shape, dtype=torch.bool, device=x_route.device)
    mask[:, [int(p) for p in positions]] = True
    return mask


def checked_edits(
    edits: FeatureEdit | Sequence[FeatureEdit], sae: SAE[Any]
) -> tuple[FeatureEdit, ...]:
    """The edits as a tuple.

    Raises:
        UserError: no edit, a feature that the SAE does not have, or two edits of one feature.
    """
    edits = (edits,) if isinstance(edits, FeatureEdit) else tuple(edits)
    if not edits:
        raise UserError("edits=[]: at least one is needed")
    seen: set[int] = set()
    for edit in edits:
        if edit.feature >= sae.cfg.d_sae:
            raise UserError(
                f"feature={edit.feature}: the SAE has features 0 to {sae.cfg.d_sae - 1}"
            )
        if edit.feature in seen:
            raise UserError(f"feature={edit.feature}: has two edits, at most one is possible")
        seen.add(edit.feature)
    return edits
