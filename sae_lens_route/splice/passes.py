"""Which forward pass a block's call belongs to.

1. *Calls.* While a hook is attached, the `forward` of the module that runs the blocks is wrapped:
   a call opens a frame and closes it however the call ends. What a hook keeps of a pass lies in the
   frame, so nothing is left of a pass that ended early.
2. *Nesting, threads.* Frames form a stack, so that a function at a hook may call the model, and
   each thread has a stack of its own.
3. *Order.* Within a call the blocks follow each other, none skipped and none repeated.
4. *Outside of any call* (blocks called one by one), a block continues a pass only if its input is
   the very tensor that the block before returned.

Anything else is no pass, and its last routed block is refused.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import Tensor

from sae_lens_route.splice.calls import BlockCall, end_use

ReadingT = TypeVar("ReadingT")
ReplayT = TypeVar("ReplayT")


@dataclass
class Pass(Generic[ReadingT, ReplayT]):
    """The state of a forward pass between its first and last routed block."""

    next_block: int
    """The only block that may run next."""
    running: int | None = None
    """The block that is running."""
    output: Tensor | None = None
    """The stream after the last block that ran."""
    streams: dict[int, Tensor] = field(default_factory=dict)
    """Outputs of the routed blocks."""
    calls: dict[int, BlockCall] = field(default_factory=dict)
    """Calls of the blocks from the first routed one on."""
    reading: ReadingT | None = None
    """Set once all streams are there."""
    replay: ReplayT | None = None
    """Set while the blocks run again."""
    contents: list[tuple] | None = None
    """What was at the hook point when it fired first."""

    def begin_block(self, index: int) -> bool:
        """Whether it is this block's turn."""
        if self.running is not None or index != self.next_block:
            return False
        self.running = index
        return True

    def end_block(self, index: int, output: Tensor) -> None:
        self.running, self.next_block, self.output = None, index + 1, output


class Frame:
    """What the attached hooks keep of one call of the model."""

    def __init__(self, is_call: bool, thread: Frame | None = None) -> None:
        self.is_call = is_call
        """False for the frame of blocks that run outside of any call."""
        self.thread = self if thread is None else thread
        """This thread's frame outside of any call, which stands for the thread."""
        self.passes: dict[object, Pass[Any, Any]] = {}
        """The unfinished pass of each hook."""
        self.overlapping: set[Frame] = set()
        """Threads that made another call at any time of this one."""
        self.read: dict[object, Any] = {}
        """What each hook keeps of its latest pass in this frame, for its user to read."""
        self.read_within: dict[object, Any] = {}
        """The same of the calls within this one."""
        self._entries: list[Any] = []  # of caches that only some blocks have written to

    def end_pass(self, finished: Pass[Any, Any]) -> None:
        """The routed blocks are done; the other blocks are when the call ends."""
        self._entries += [c.entry for c in finished.calls.values() if c.entry is not None]
        if not self.is_call:
            self.end()

    def end(self) -> None:
        """The call returned."""
        for entry in self._entries:
            end_use(entry)
        self._entries.clear()


class Frames(threading.local):
    """This thread's open frames, the innermost last."""

    def __init__(self) -> None:
        self.stack = [Frame(is_call=False)]
