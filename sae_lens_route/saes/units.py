"""Units of feature activations: of the normalized stream n(x), or of the routed activation.

Hard routing scales the stream that it chooses, x_route = p n(x), and p differs from token to token.
With z the activations of x_route,

    decode(z) / p = sum_j (z_j / p) W_dec[j] + b_dec / p,

so z / p is what a feature contributes to n(x), and means the same at every token. Contexts, tables,
pages, edits and concept scores are in this unit, "n(x)". "x_route" leaves z as the SAE computes it,
the paper's convention. Both are the same wherever p does not scale: under soft or uniform routing,
with `scale_by_probability=False`, and for crosscoders.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from jaxtyping import Float
from sae_lens.saes.sae import SAE
from torch import Tensor

from sae_lens_route.errors import UserError
from sae_lens_route.saes.router import Routing

Units = Literal["n(x)", "x_route"]


def is_scaled(sae: SAE[Any]) -> bool:
    """Whether p scales what the SAE reads, so that the two units differ."""
    cfg = sae.cfg
    return getattr(cfg, "routing", None) == "hard" and cfg.scale_by_probability


def activation_unit(
    routing: Routing, sae: SAE[Any], units: Units = "n(x)"
) -> Float[Tensor, ...] | None:
    """The activation of x_route that one unit is, for each token; None where it is 1."""
    return routing.weight if units == "n(x)" and is_scaled(sae) else None


def in_units(
    feature_acts: Float[Tensor, "... n"], routing: Routing, sae: SAE[Any], units: Units = "n(x)"
) -> Float[Tensor, "... n"]:
    """Activations of x_route in the given units.

    Args:
        feature_acts: What the SAE encodes x_route to, of all features or of some.
        routing: Of the same tokens.
        sae: The RouteSAE.
        units: "n(x)" divides by p where p scales; "x_route" leaves the activations as they are.
    """
    unit = activation_unit(routing, sae, units)
    if unit is None:
        return feature_acts
    dense = feature_acts.to_dense() if feature_acts.is_sparse else feature_acts
    return dense / unit.unsqueeze(-1)


def require_units(units: str) -> None:
    """Raises a `UserError` for a name that is no unit."""
    if units not in get_args(Units):
        raise UserError(f"units={units!r}: must be one of {', '.join(get_args(Units))}")
