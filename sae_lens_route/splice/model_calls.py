"""The calls of an attached model: the frames of its passes, and which thread may use it when.

Hooks and SAEs are a state of the model, not of a thread. Whatever one thread adds, the passes of
all threads reach; TransformerLens counts the temporary hooks of all threads together; SAELens's
`saes()` restores at its end what it found at its beginning, including another thread's SAE; and
`run_with_hooks` of a bridge skips a name whose place an SAE has taken. Once that has happened, no
check can tell whose pass is right. So the methods that change a model take turns while an SAE is
attached:

1. Passes of several threads may overlap.
2. A *change* (a call of one of `CALLS`, a `with` block of one of `CONTEXTS`) needs the model alone.
   It is refused while another thread is in a pass or in a change, and until it ends, passes and
   changes of other threads are refused.
3. What a change leaves behind (`add_hook`, `add_sae`) is for the passes of all threads.

A refusal is a `UserError`, raised before anything has changed; the other thread is not disturbed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial, update_wrapper
from threading import RLock
from typing import Any, NamedTuple, cast

from torch import nn
from transformer_lens import HookedTransformer

from sae_lens_route.errors import UserError
from sae_lens_route.models.kinds import LanguageModel, block_loop
from sae_lens_route.splice.passes import Frame, Frames

CALLS = (
    "add_hook",
    "add_perma_hook",
    "add_caching_hooks",
    "reset_hooks",
    "remove_all_hook_fns",
    "run_with_hooks",
    "run_with_cache",
    "add_sae",
    "reset_saes",
)
"""Methods that change the hooks or SAEs of a model, until they return or for good."""
CONTEXTS = ("hooks", "saes")
"""Methods that change them for a `with` block."""
_TAKE_TURNS = (
    "Hooks and SAEs belong to the model, not to a thread. Let threads take turns with a lock; a "
    "function or an SAE for the passes of all threads is added by model.add_hook(name, function) "
    "or model.add_sae(sae) while no other thread runs the model"
)
_LOCK = RLock()


@dataclass(eq=False)
class _Change:
    thread: Frame
    what: str
    removed: str | None = None
    """A hook point that another thread removed since the change began."""

    def require_attached(self) -> None:
        if self.removed is not None:
            raise UserError(
                f"another thread removed {self.removed!r} during this thread's {self.what}, whose "
                f"result may lack an edit. {_TAKE_TURNS}"
            )


class _Running:
    """What runs at present. A copy of the model is in no call."""

    def __init__(self) -> None:
        self.frames = Frames()
        self.passes: list[Frame] = []
        self.changes: list[_Change] = []  # of one thread, the innermost last

    def __reduce__(self) -> tuple[type[_Running], tuple[()]]:
        return _Running, ()


class _Wrapped(NamedTuple):
    """A method of a module that was replaced by a wrapper."""

    module: nn.Module
    name: str
    own: Any
    """What the module itself, not its class, had at this name."""
    wrapper: partial[Any]

    def restore(self) -> None:
        current = vars(self.module).get(self.name)
        if getattr(current, "func", None) != self.wrapper.func:
            return  # something else wrapped it since, and calls this wrapper
        if self.own is None:
            delattr(self.module, self.name)
        else:
            setattr(self.module, self.name, self.own)


class ModelCalls:
    """Passes and changes of a model, shared by the hooks that are attached to it.

    A pass is a call of `forward` of the module that runs the blocks, which several proxies may
    share. That method and those that change a model are wrapped while they are watched.
    """

    def __init__(self, loop: nn.Module) -> None:
        self._users: list[nn.Module] = []
        self._running = _Running()
        self._methods: list[_Wrapped] = []
        self._forward = self._wrap(loop, "forward", self._pass)

    @classmethod
    def watch(cls, model: LanguageModel) -> ModelCalls:
        """The calls of this model; `release` as often as you `watch`."""
        loop = block_loop(model)
        with _LOCK:
            calls = _calls_of(loop) or cls(loop)
            if model not in calls._users:
                for names, wrapper in ((CALLS, calls._call), (CONTEXTS, calls._context)):
                    calls._methods += [
                        calls._wrap(model, name, partial(wrapper, model))
                        for name in names
                        if hasattr(model, name)
                    ]
            calls._users.append(model)
        return calls

    @classmethod
    def watches(cls, model: LanguageModel) -> bool:
        """Whether the model's calls are watched."""
        found = _calls_of(block_loop(model))
        return found is not None and model in found._users

    def release(self, model: LanguageModel) -> None:
        """The last release restores the model's methods."""
        with _LOCK:
            self._users.remove(model)
            if model not in self._users:
                for method in self._methods:
                    if method.module is model:
                        method.restore()
                self._methods = [other for other in self._methods if other.module is not model]
            self._restore_if_unused()

    def _restore_if_unused(self) -> None:
        if not self._users and not self._running.changes:
            self._forward.restore()

    @staticmethod
    def _wrap(module: nn.Module, name: str, wrapper: Callable[..., Any]) -> _Wrapped:
        method = getattr(module, name)
        wrapped = partial(wrapper, method)
        update_wrapper(wrapped, method)
        own = vars(module).get(name)
        setattr(module, name, wrapped)
        return _Wrapped(module, name, own, wrapped)

    @property
    def frame(self) -> Frame:
        """This thread's innermost frame."""
        return self._running.frames.stack[-1]

    # --- passes ----------------------------------------------------------------------------------

    def _pass(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        stack = self._running.frames.stack
        frame, depth = Frame(is_call=True, thread=stack[0]), len(stack)
        try:
            with self._stopping(kwargs), self.overlapping(frame):
                stack.append(frame)
                output = forward(*args, **kwargs)
                frame.end()
                return output
        finally:
            del stack[depth:]
            latest = {**frame.read_within, **frame.read}
            (stack[-1].read_within if stack[-1].is_call else stack[-1].read).update(latest)

    def _stopping(self, kwargs: dict[str, Any]) -> AbstractContextManager[None]:
        """A bridge notes on its blocks where a pass stops, and the passes of all threads do."""
        if kwargs.get("stop_at_layer") is None or isinstance(
            self._forward.module, HookedTransformer
        ):
            return nullcontext()
        return self.alone("pass with stop_at_layer on a bridge")

    @contextmanager
    def overlapping(self, frame: Frame) -> Iterator[None]:
        """The time of a pass, which notes the threads whose passes overlap it.

        Raises:
            UserError: another thread is in a change.
        """
        passes = self._running.passes
        frame.overlapping.clear()
        try:
            with _LOCK:
                for change in self._running.changes:
                    if change.thread is not frame.thread:
                        raise _refusal("pass", change.what)
                    change.require_attached()
                for other in passes:
                    other.overlapping.add(frame.thread)
                    frame.overlapping.add(other.thread)
                passes.append(frame)
            yield
        finally:
            with _LOCK:
                if frame in passes:
                    passes.remove(frame)

    # --- changes ---------------------------------------------------------------------------------

    def _call(self, model: nn.Module, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.alone(f"model.{method.__name__}()"):
            _require_hook_points(model, method, args, kwargs)
            return method(*args, **kwargs)

    @contextmanager
    def _context(
        self, model: nn.Module, method: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Iterator[Any]:
        with self.alone(f"model.{method.__name__}()"):
            _require_hook_points(model, method, args, kwargs)
            with method(*args, **kwargs) as value:
                yield value

    @contextmanager
    def alone(self, what: str) -> Iterator[None]:
        """The time of a change, in which only this thread uses the model.

        Raises:
            UserError: another thread is in a pass or in a change, or it removed a hook point.
        """
        running = self._running
        change = _Change(running.frames.stack[0], what)
        try:
            with _LOCK:
                for other in running.changes:
                    if other.thread is not change.thread:
                        raise _refusal(what, other.what)
                if any(other.thread is not change.thread for other in running.passes):
                    raise _refusal(what, "pass")
                running.changes.append(change)
            yield
            change.require_attached()
        finally:
            with _LOCK:
                if change in running.changes:
                    running.changes.remove(change)
                self._restore_if_unused()

    def announce_removal(self, name: str) -> None:
        """Refuse what other threads do at hook point `name`, which will be removed."""
        with _LOCK:
            for change in self._running.changes:
                if change.thread is not self._running.frames.stack[0]:
                    change.removed = name


def _calls_of(loop: nn.Module) -> ModelCalls | None:
    found = getattr(getattr(vars(loop).get("forward"), "func", None), "__self__", None)
    return found if isinstance(found, ModelCalls) else None


def _refusal(mine: str, other: str) -> UserError:
    return UserError(f"this thread's {mine} began during another thread's {other}. {_TAKE_TURNS}")


def _require_hook_points(
    model: nn.Module, method: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
) -> None:
    """Raise a UserError for hooks at a place that an SAE has taken: a bridge would skip them."""
    taken: dict[str, Any] = getattr(model, "acts_to_saes", {})
    if not taken:
        return
    given = inspect.signature(method).bind_partial(*args, **kwargs).arguments
    hooks = [given.get(field) for field in ("fwd_hooks", "bwd_hooks")]
    names = {name for each in hooks if isinstance(each, Sequence) for name, _ in each}
    for name in taken.keys() & names:
        if name not in cast("Any", model).hook_dict:
            raise UserError(
                f"an SAE is at {name!r}, so a hook there would not run: add it at "
                f"{name + '.hook_sae_input'!r}, or reset_saes() first"
            )
