"""`RouteSAETransformer`: a HookedSAETransformer that attaches RouteSAEs and crosscoders itself."""

from __future__ import annotations

from typing import Any

from sae_lens import HookedSAETransformer
from sae_lens.saes.sae import SAE
from typing_extensions import override

from sae_lens_route.saes.crosscoder import CrosscoderSAEMixin
from sae_lens_route.saes.routed import RoutedSAEMixin
from sae_lens_route.splice.attach import attach
from sae_lens_route.splice.hook import StreamsHook, attached_hook
from sae_lens_route.splice.model_calls import ModelCalls


class RouteSAETransformer(HookedSAETransformer):
    """A HookedSAETransformer that takes RouteSAEs and crosscoders as it takes ordinary SAEs.

    `add_sae`, `saes()`, `run_with_saes` and the like attach an SAE, and resetting it detaches it.
    An SAE attached by hand (to choose `unscaled`, say) stays attached.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._routed_hooks: dict[str, StreamsHook[Any, Any]] = {}
        ModelCalls.watch(self)  # before an SAE is attached: that happens within `saes()`

    @override
    def add_sae(self, sae: SAE[Any], *args: Any, **kwargs: Any) -> None:
        if isinstance(sae, RoutedSAEMixin | CrosscoderSAEMixin):
            self._attach(sae)
        super().add_sae(sae, *args, **kwargs)

    def _attach(self, sae: RoutedSAEMixin | CrosscoderSAEMixin) -> None:
        name = sae.cfg.metadata.hook_name
        attached = (attached_hook(block) for block in self.blocks)
        if any(hook is not None and hook.name == name and hook.sae is sae for hook in attached):
            return
        if name in self._routed_hooks:
            self._routed_hooks[name].remove()
        self._routed_hooks[name] = attach(self, sae)

    @override
    def _reset_sae(self, act_name: str, prev_wrapper: Any = None) -> None:
        super()._reset_sae(act_name, prev_wrapper)
        if act_name in self._routed_hooks and act_name not in self._acts_to_saes:
            self._routed_hooks.pop(act_name).remove()
