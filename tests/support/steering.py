"""Edits of a small random SAE, written out by hand."""

import torch

from sae_lens_route.steering import FeatureEdit

ROUTED, N_LAYERS = [1, 2, 4], 6
EDITS = [
    FeatureEdit(3, "set", 6.0),
    FeatureEdit(70, "add", -2.5),
    FeatureEdit(11, "scale", 3.0),
    FeatureEdit(40, "ablate"),
]
NO_CHANGE = [FeatureEdit(3, "scale", 1.0), FeatureEdit(11, "add", 0.0)]
PROMPT = "A list of header names"


def edited_latents(z):
    """What EDITS do, written out."""
    z = z.clone()
    z[..., 3] = 6.0
    z[..., 70] -= 2.5
    z[..., 11] *= 3.0
    z[..., 40] = 0.0
    return z


def by_hand(sae, mask, use_error_term=True):
    """The edit of the activation x where `mask`, from the definition."""

    def f(x):
        z = sae.encode(x)
        difference = (edited_latents(z) - z) @ sae.W_dec
        reconstruction = edited_latents(z) @ sae.W_dec + sae.b_dec
        edited = x + difference if use_error_term else reconstruction
        return torch.where(mask.unsqueeze(-1), edited, x)

    return f


def ids_of(result, generated=None):
    """Token ids of a steering result: all, or only those of the prompt or the steered text."""
    wanted = (t for t in result.tokens if generated is None or t.generated == generated)
    return [t.token_id for t in wanted]
