"""Edits of features, and the hook function that applies them.

A feature is edited at the routed hook. There a token's routed activation x_route, at the token's
own block (see `splice/hook.py`), becomes

    z = encode(x_route),   z' = z with the edits,   x_route  <-  x_route + decode(z') - decode(z).

Only the difference is added, so the part that the SAE does not reconstruct stays in the model, and
a token whose features the edits leave unchanged is bit-identical. With `use_error_term=False`
steered tokens become decode(z') instead, which loses that part.

**Units.** Values are what a feature contributes to n(x), whatever the token's p: the activation at
the hook becomes p times the value, and the residual stream gets the value times `scale`
(`saes/units.py`). With `units="x_route"` values are the activation itself, as in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Bool, Float
from sae_lens.saes.sae import SAE
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from sae_lens_route.errors import UserError
from sae_lens_route.saes.units import Units, activation_unit, require_units
from sae_lens_route.splice import RoutedHook

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
        value: An activation, or the factor of "scale"; negative steers away. None for "ablate".
        relative: For "set" and "add": the value is a multiple of the feature's largest activation,
            which `steer` and `edit_features` take as `maxima`.

    Raises:
        UserError: a feature, mode or value that is not possible.
    """

    feature: int
    mode: EditMode = "set"
    value: int | float | None = None
    relative: bool = False

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
        if self.relative and self.mode not in ("set", "add"):
            raise UserError(
                f"relative=True: mode={self.mode!r} has no value that could be a multiple of the "
                "feature's maximum; 'set' and 'add' have"
            )

    @classmethod
    def parse(cls, text: str) -> FeatureEdit:
        """An edit written as FEATURE:MODE:VALUE, such as "17:set:5", "17:scale:-1" or "17:ablate".

        "17:set:1.5x" sets the feature to 1.5 times its maximum.

        Raises:
            UserError: another form, or a feature, mode or value that is not possible.
        """
        feature, mode, value = (*text.split(":", 2), "", "")[:3]
        try:
            if mode not in _WORDS:
                raise UserError(f"mode={mode!r}: must be one of {', '.join(_WORDS)}")
            number = float(value.removesuffix("x")) if value else None
            return cls(int(feature), cast(EditMode, mode), number, value.endswith("x"))
        except ValueError as error:
            raise UserError(
                f"edit={text!r}: must be FEATURE:MODE:VALUE, such as 17:set:5, 17:set:1.5x, "
                f"17:add:2, 17:scale:0.5 or 17:ablate ({error})"
            ) from error

    def __str__(self) -> str:
        value = 0.0 if self.value is None else self.value
        number = f"{value:g}x its maximum" if self.relative else f"{value:g}"
        return f"feature {self.feature} {_WORDS[self.mode].format(number)}"

    def apply(self, acts: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """The feature's activations after the edit."""
        if self.mode == "add":
            return acts + cast(float, self.value)
        if self.mode == "scale":
            return acts * cast(float, self.value)
        return torch.full_like(acts, self.value or 0.0)  # "set" and "ablate"


def edit_features(
    handle: RoutedHook,
    edits: FeatureEdit | Sequence[FeatureEdit],
    positions: Sequence[int] | Bool[Tensor, ...] | None = None,
    *,
    maxima: Mapping[int, float] | None = None,
    units: Units = "n(x)",
    use_error_term: bool = True,
) -> Callable[..., Float[Tensor, "batch pos d"]]:
    """A hook function that edits features, for `run_with_hooks` at an attached SAE's hook point.

        with attach(model, sae) as handle:
            hooks = [(handle.name, edit_features(handle, FeatureEdit(17, "set", 5)))]
            logits = model.run_with_hooks(tokens, fwd_hooks=hooks)

    The function keeps no state and is differentiable. During generation, `positions` count from the
    start of each pass, not of the text.

    Args:
        handle: What `attach` returned; it knows the p of each token of the pass.
        edits: One or several, at most one per feature.
        positions: Tokens to edit: indices of positions, or a mask `[pos]` or `[batch, pos]`; None
            for all. The others are bit-identical.
        maxima: Feature -> its largest activation, for relative edits (`maxima.py`).
        units: Of the values and maxima.
        use_error_term: Add only the difference that the edits make; otherwise the edited
            reconstruction replaces the activation.

    Raises:
        UserError: edits that the SAE cannot take, a relative edit without a maximum; during a pass,
            positions outside of it.
    """
    require_units(units)
    sae = handle.sae
    edits = absolute_edits(checked_edits(edits, sae), maxima)

    def hook_function(
        x_route: Float[Tensor, "batch pos d"], hook: HookPoint | None = None
    ) -> Float[Tensor, "batch pos d"]:
        mask = None if positions is None else _position_mask(positions, x_route)
        assert handle.routing is not None
        unit = activation_unit(handle.routing, sae, units)
        return apply_edits(sae, edits, x_route, unit, mask, use_error_term).x_route

    return hook_function


class Edited(NamedTuple):
    """A routed activation after n edits."""

    x_route: Float[Tensor, "batch pos d"]
    before: Float[Tensor, "batch pos n"]
    """Activations of the n edited features, in the units of the edits."""
    after: Float[Tensor, "batch pos n"]
    """The same after the edits; equal to `before` on tokens that are not steered."""


def apply_edits(
    sae: SAE[Any],
    edits: Sequence[FeatureEdit],
    x_route: Float[Tensor, "batch pos d"],
    unit: Float[Tensor, "batch pos"] | None,
    mask: Bool[Tensor, ...] | None,
    use_error_term: bool,
) -> Edited:
    """Apply edits at the tokens of `mask`, or at all tokens if it is None.

    `unit` is the activation of x_route that one unit of the edits' values is, 1 if it is None.
    """
    acts = sae.encode(x_route)
    per_token = 1.0 if unit is None else unit.unsqueeze(-1)
    features = torch.tensor([edit.feature for edit in edits], device=acts.device)
    before = acts[..., features] / per_token
    after = torch.stack([e.apply(before[..., i]) for i, e in enumerate(edits)], dim=-1)
    if mask is not None:
        after = torch.where(mask.unsqueeze(-1), after, before)
    result = sae.decode(acts.index_copy(-1, features, after * per_token))
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


def absolute_edits(
    edits: Sequence[FeatureEdit], maxima: Mapping[int, float] | None
) -> tuple[FeatureEdit, ...]:
    """The edits, relative ones with the value that the feature's maximum makes of them.

    Raises:
        UserError: a relative edit of a feature without a maximum above 0.
    """
    return tuple(_absolute(edit, maxima or {}) if edit.relative else edit for edit in edits)


def _absolute(edit: FeatureEdit, maxima: Mapping[int, float]) -> FeatureEdit:
    maximum = maxima.get(edit.feature)
    if maximum is None:
        raise UserError(
            f"{edit}: the maximum is not known; pass maxima=measured_maxima(model, sae, edits)"
        )
    if not maximum > 0:
        raise UserError(
            f"{edit}: it never fired on the text that the maximum was taken from; give a number, "
            "or a text on which it fires"
        )
    return replace(edit, value=cast(float, edit.value) * maximum, relative=False)
