"""SAELens's models take RouteSAEs and crosscoders as they take ordinary SAEs.

SAELens skips an SAE whose hook point the model does not have: a line in the log, and logits that
are the clean ones. So `import sae_lens_route` extends three methods of `HookedSAETransformer` and
`SAETransformerBridge` (`registration_hook.py`): an SAE that is added is attached first, and one
that is reset is detached. `run_with_saes` and the like call these. Ordinary SAEs go to SAELens as
ever. An SAE attached by hand (to choose `unscaled`, say) stays attached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sae_lens.saes.sae import SAE

from sae_lens_route.models.kinds import decoder_blocks
from sae_lens_route.saes.crosscoder import CrosscoderSAEMixin
from sae_lens_route.saes.routed import RoutedSAEMixin
from sae_lens_route.splice.attach import attach
from sae_lens_route.splice.hook import StreamsHook, attached_hook
from sae_lens_route.splice.model_calls import ModelCalls

_HOOKS = "_routed_hooks"
"""Attribute of a model: the hooks that were attached for it, by name."""


def add_sae(
    original: Callable[..., None], model: Any, sae: SAE[Any], *args: Any, **kwargs: Any
) -> None:
    """`model.add_sae`, which attaches the SAE unless it is attached already.

    Raises:
        UserError: as `attach`.
    """
    attached = _attached(model, sae) if _reads_streams(sae) else None
    try:
        original(model, sae, *args, **kwargs)
    except BaseException:
        if attached is not None:
            _detach(model, attached.name)
        raise


def reset_sae(
    original: Callable[..., None], model: Any, act_name: str, *args: Any, **kwargs: Any
) -> None:
    """`model._reset_sae`, which detaches what `add_sae` attached."""
    original(model, act_name, *args, **kwargs)
    if act_name in _hooks_of(model) and act_name not in model._acts_to_saes:
        _detach(model, act_name)


@contextmanager
def saes(
    original: Callable[..., Any],
    model: Any,
    saes: SAE[Any] | Sequence[SAE[Any]] = (),
    *args: Any,
    **kwargs: Any,
) -> Iterator[Any]:
    """`model.saes`; the block is a change of the model from its beginning (`model_calls.py`)."""
    saes = [saes] if isinstance(saes, SAE) else list(saes)
    if ModelCalls.watches(model) or not any(map(_reads_streams, saes)):
        with original(model, saes, *args, **kwargs) as value:
            yield value
        return
    calls = ModelCalls.watch(model)
    try:
        with model.saes(saes, *args, **kwargs) as value:  # now a change
            yield value
    finally:
        calls.release(model)


def _reads_streams(sae: object) -> bool:
    return isinstance(sae, RoutedSAEMixin | CrosscoderSAEMixin)


def _hooks_of(model: Any) -> dict[str, StreamsHook[Any, Any]]:
    return vars(model).get(_HOOKS, {})


def _detach(model: Any, name: str) -> None:
    hooks = _hooks_of(model)
    hook = hooks.pop(name)
    if not hooks:
        del vars(model)[_HOOKS]
    hook.remove()


def _attached(model: Any, sae: Any) -> StreamsHook[Any, Any] | None:
    """Attach; returns the new hook, None if this SAE is attached already."""
    name = sae.cfg.metadata.hook_name
    present = (attached_hook(block) for block in decoder_blocks(model))
    if any(hook is not None and hook.name == name and hook.sae is sae for hook in present):
        return None
    if name in _hooks_of(model):
        _detach(model, name)
    hook = attach(model, sae)
    vars(model).setdefault(_HOOKS, {})[name] = hook
    return hook
