"""`attach`: the entrance to the splice."""

from __future__ import annotations

from typing import overload

from sae_lens_route.errors import UserError
from sae_lens_route.models.kinds import LanguageModel
from sae_lens_route.saes.crosscoder import CrosscoderSAEMixin
from sae_lens_route.saes.routed import RoutedSAEMixin
from sae_lens_route.splice.crosscoder import CrosscoderHook
from sae_lens_route.splice.routed import RoutedHook


@overload
def attach(model: LanguageModel, sae: RoutedSAEMixin, *, unscaled: bool = ...) -> RoutedHook: ...


@overload
def attach(model: LanguageModel, sae: CrosscoderSAEMixin) -> CrosscoderHook: ...


def attach(
    model: LanguageModel, sae: RoutedSAEMixin | CrosscoderSAEMixin, *, unscaled: bool = False
) -> RoutedHook | CrosscoderHook:
    """Add the hook point of `sae` to `model`, until `.remove()` or the end of a `with` block.

    Args:
        model: A HookedTransformer, a TransformerBridge, or SAELens's HookedProxyLM around a Hugging
            Face model (whose own `generate` then passes through the hook point as well).
        sae: A RouteSAE or a crosscoder. Its metadata names the hook point (`hook_name`) and the L
            residual streams it was trained on (`hook_names`), as any of these models spells them.
        unscaled: Leave out p, at the hook point and in the edit, as the paper's code does in its
            evaluation.

    Raises:
        UserError: another SAE is attached to these blocks, the SAE's metadata does not fit the
            model, or `unscaled` with a crosscoder, which has no p.
        TypeError: the model has no hook points.
    """
    if isinstance(sae, CrosscoderSAEMixin):
        if unscaled:
            raise UserError("unscaled=True: a crosscoder has no route probability to leave out")
        return CrosscoderHook(model, sae)
    return RoutedHook(model, sae, unscaled)
