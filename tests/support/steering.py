"""Edits of a small random SAE, written out by hand."""

from unittest.mock import Mock

import torch

from sae_lens_route.models.kinds import decoder_blocks
from sae_lens_route.saes.router import Routing
from sae_lens_route.splice import RoutedHook
from sae_lens_route.steering import FeatureEdit
from support.splice import brute_routing, clean_streams, run

ROUTED, N_LAYERS = [1, 2, 4], 6
EDITS = [
    FeatureEdit(3, "set", 6.0),
    FeatureEdit(70, "add", -2.5),
    FeatureEdit(11, "scale", 3.0),
    FeatureEdit(40, "ablate"),
]
NO_CHANGE = [FeatureEdit(3, "scale", 1.0), FeatureEdit(11, "add", 0.0)]
PROMPT = "A list of header names"


def unit_of(model, sae, tokens, units):
    """The activation of x_route that one unit is: p of each token, or 1."""
    if units == "x_route":
        return 1.0
    _, streams = clean_streams(decoder_blocks(model), ROUTED, lambda: run(model, tokens))
    return brute_routing(sae, streams)[0].unsqueeze(-1)


def edited_latents(z, unit=1.0):
    """What EDITS do to the activations z of x_route, written out."""
    unit = torch.ones_like(z[..., :1]) * unit
    z = z.clone()
    z[..., 3] = 6.0 * unit[..., 0]
    z[..., 70] -= 2.5 * unit[..., 0]
    z[..., 11] *= 3.0
    z[..., 40] = 0.0
    return z


def by_hand(sae, mask, use_error_term=True, unit=1.0):
    """The edit of the activation x where `mask`, from the definition."""

    def f(x):
        z = sae.encode(x)
        difference = (edited_latents(z, unit) - z) @ sae.W_dec
        reconstruction = edited_latents(z, unit) @ sae.W_dec + sae.b_dec
        edited = x + difference if use_error_term else reconstruction
        return torch.where(mask.unsqueeze(-1), edited, x)

    return f


def attached(sae, weight):
    """What a hook function reads of an attached SAE, for use without a model."""
    per_route = weight.unsqueeze(-1)
    routing = Routing(per_route, weight.long(), weight, per_route, per_route, per_route)
    return Mock(spec=RoutedHook, sae=sae, routing=routing)


def ids_of(result, generated=None):
    """Token ids of a steering result: all, or only those of the prompt or the steered text."""
    wanted = (t for t in result.tokens if generated is None or t.generated == generated)
    return [t.token_id for t in wanted]
