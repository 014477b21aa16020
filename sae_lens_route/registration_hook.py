"""Registers the architectures with SAELens when SAELens is imported.

SAELens finds an architecture only in its registries, which do not exist before it is imported, and
importing it takes seconds. So `import sae_lens_route` does not import SAELens, it watches for it:

1. If SAELens is in memory, `sae_lens_route.saes` is imported now, which registers everything, and
   SAELens's models learn to take what is registered (`splice/saelens_models.py`).
2. Otherwise a finder is put at the head of `sys.meta_path`. It only answers for `sae_lens`: the
   other finders locate the package as always, and its loader is wrapped.
3. The wrapped loader runs SAELens, removes the finder and does what 1 says. From then on SAELens
   has its original loader, and nothing of this module is left in the import system.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from typing_extensions import override

_SAE_LENS, _SAES = "sae_lens", "sae_lens_route.saes"
_SAELENS_MODELS = "sae_lens_route.splice.saelens_models"
_ORIGINAL = "_sae_lens_route_extends"


def register_with_sae_lens() -> None:
    """Register the architectures: now if SAELens is in memory, otherwise when it is imported."""
    _remove_finders()
    if _SAE_LENS in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _SaeLensFinder())


def _register() -> None:
    importlib.import_module(_SAES)
    for name in ("hooked_sae_transformer.HookedSAETransformer", *_bridge()):
        module, _, model_class = f"sae_lens.analysis.{name}".rpartition(".")
        for method in ("add_sae", "saes", "_reset_sae"):
            _extend(getattr(importlib.import_module(module), model_class), method)


def _bridge() -> tuple[str, ...]:
    compat = importlib.import_module("sae_lens.analysis.compat")
    has_one = compat.has_transformer_bridge()
    return ("sae_transformer_bridge.SAETransformerBridge",) if has_one else ()


def _extend(model_class: Any, name: str) -> None:
    """Let a method of SAELens be called by the function of its name in `saelens_models`.

    The function's module is imported when the method is called: now, some of it may be half loaded.
    """
    method = vars(model_class)[name]
    original = getattr(method, _ORIGINAL, method)

    @functools.wraps(original)
    def extended(model: Any, *args: Any, **kwargs: Any) -> Any:
        functions = importlib.import_module(_SAELENS_MODELS)
        return getattr(functions, name.lstrip("_"))(original, model, *args, **kwargs)

    setattr(extended, _ORIGINAL, original)
    setattr(model_class, name, extended)


def _remove_finders() -> None:
    # by name, because after a reload of this module the class is another one
    sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != _SaeLensFinder.__name__]


class _SaeLensFinder(MetaPathFinder):
    """Wraps the loader that the other finders find for SAELens."""

    @override
    def find_spec(
        self, fullname: str, path: Iterable[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _SAE_LENS:
            return None
        for finder in sys.meta_path:
            if finder is self:
                continue
            spec = finder.find_spec(fullname, None, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _RegisteringLoader(spec.loader)
                return spec
        return None


class _RegisteringLoader(Loader):
    """Loads SAELens as its original loader does, then registers the architectures."""

    def __init__(self, original: Loader) -> None:
        self.original = original

    @override
    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.original.create_module(spec)

    @override
    def exec_module(self, module: ModuleType) -> None:
        # reloads, resources and source lines are the original loader's affair
        module.__loader__ = self.original
        if module.__spec__ is not None:
            module.__spec__.loader = self.original
        self.original.exec_module(module)
        _remove_finders()
        _register()
