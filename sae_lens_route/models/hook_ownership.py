"""Which thread the contents of an added hook point belong to.

Hooks and SAEs are a state of the model, not of a thread: whatever one thread adds, the passes of
all threads reach, and TransformerLens removes temporary hooks by a level that all threads count
together. At the hook point that this package adds, a pass is therefore right or refused:

1. A hook added by `add_hook` or `add_perma_hook` is for all threads.
2. A temporary hook (`run_with_hooks`, `run_with_cache`, `hooks()`) belongs to the thread that added
   it and is removed by that thread only. A pass of another thread that reaches it is refused.
3. An SAE (`add_sae`, `saes()`, `run_with_saes`) belongs to the thread that added it in the same
   way, because SAELens does not tell a temporary one from one that stays.
4. A thread whose hooks or SAE another thread removed or replaced nevertheless is refused, once.
"""

from __future__ import annotations

from functools import wraps
from threading import RLock, get_ident
from typing import Any, Literal

from torch import nn
from transformer_lens.hook_points import HookPoint
from typing_extensions import override

_LOCK = RLock()  # TransformerLens rebuilds its lists of hooks without one
ONE_THREAD = (
    "add, run and remove in one thread, and let threads take turns with a lock; a function for "
    "the passes of all threads is added by model.add_hook(name, function)"
)


class OwnedHookPoint(HookPoint):
    """A HookPoint whose temporary hooks belong to the thread that added them."""

    _bereft: set[int]
    """Threads whose hooks another thread removed."""
    _is_replaced: bool

    def __init__(self) -> None:
        super().__init__()
        self._own(set())

    @classmethod
    def of(cls, point: HookPoint, bereft: set[int]) -> None:
        """Turn a HookPoint into an owned one that shares this set; the object stays the same."""
        if not isinstance(point, OwnedHookPoint):
            point.__class__ = cls
        assert isinstance(point, OwnedHookPoint)
        point._own(bereft)

    def _own(self, bereft: set[int]) -> None:
        vars(self).update(_bereft=bereft, _is_replaced=False)

    @override
    def add_hook(
        self,
        hook: Any,
        dir: Literal["fwd", "bwd"] = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        # backward hooks run in a thread of autograd's
        function = hook if level is None or dir == "bwd" else _only_in_this_thread(hook)
        with _LOCK:
            if self._is_replaced:
                raise RuntimeError(f"an SAE took the place of this hook point, {self.name!r}")
            before = self._handles()
            super().add_hook(function, dir, is_permanent, level, *args, **kwargs)
            if level is not None:
                for handle in self._handles():
                    if not any(handle is other for other in before):
                        vars(handle)["thread"] = get_ident()

    @override
    def remove_hooks(
        self,
        dir: Literal["fwd", "bwd", "both"] = "fwd",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        with _LOCK:
            if level is None or including_permanent:
                self._bereave()
                super().remove_hooks(dir, including_permanent, level)
                return
            # Of this thread only. A higher level than the one that ends was counted by others.
            for name in ("fwd_hooks", "bwd_hooks") if dir == "both" else (f"{dir}_hooks",):
                kept = []
                for handle in getattr(self, name):
                    is_own = vars(handle).get("thread") == get_ident()
                    if is_own and handle.context_level >= level:
                        handle.hook.remove()
                    else:
                        kept.append(handle)
                setattr(self, name, kept)

    @property
    def has_temporary_hooks(self) -> bool:
        return bool(self._owners())

    def require_own(self) -> None:
        """Raise a RuntimeError unless the temporary hooks are those this thread added."""
        with _LOCK:
            is_bereft = get_ident() in self._bereft
            self._bereft.discard(get_ident())
        if is_bereft:
            raise RuntimeError(
                f"another thread removed hooks that this one added at {self.name!r}: {ONE_THREAD}"
            )
        if any(
            vars(handle).get("thread", get_ident()) != get_ident() for handle in self._handles()
        ):
            raise _foreign(self.name, "hooks")

    def replace(self) -> None:
        """An SAE takes the place: no hook runs here any more."""
        with _LOCK:
            self._bereave()
            vars(self)["_is_replaced"] = True

    def _bereave(self) -> None:
        self._bereft |= self._owners() - {get_ident()}

    def _owners(self) -> set[int]:
        """The threads that have temporary hooks here."""
        return {vars(h)["thread"] for h in self._handles() if "thread" in vars(h)}

    def _handles(self) -> list[Any]:
        return [*self.fwd_hooks, *self.bwd_hooks]


class HookPointHolder(nn.Module):
    """The module in a block that holds the hook point, where `add_sae` puts an SAE instead."""

    def __init__(self) -> None:
        super().__init__()
        self._added: dict[int, nn.Module] = {}  # thread -> the SAE that it added
        self._bereft: set[int] = set()

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module):
            before = self._modules.get(name)
            if isinstance(before, OwnedHookPoint):
                before.replace()
            if isinstance(value, HookPoint):
                OwnedHookPoint.of(value, self._bereft)
                self._added.pop(get_ident(), None)
            else:
                self._added[get_ident()] = value
        super().__setattr__(name, value)

    def require_own(self, point: nn.Module, name: str) -> None:
        """Raise a RuntimeError unless the SAE at the hook point is the one this thread added."""
        own = self._added.get(get_ident())
        if own is not None and point is not own:
            raise RuntimeError(
                f"another thread replaced the SAE that this one added at {name!r}: {ONE_THREAD}"
            )
        if own is None and not isinstance(point, HookPoint):
            raise _foreign(name, "an SAE")


def _only_in_this_thread(hook: Any) -> Any:
    """The hook function; called from another thread, it raises."""
    owner = get_ident()

    @wraps(hook, updated=())
    def function(value: Any, *, hook: Any, _function: Any = hook) -> Any:
        if get_ident() != owner:
            raise _foreign(hook.name, "hooks")
        return _function(value, hook=hook)

    return function


def _foreign(name: str | None, what: str) -> RuntimeError:
    return RuntimeError(
        f"this pass reached {what} that another thread added at {name!r} for itself: {ONE_THREAD}"
    )
