"""One forward of a transformer after the other: what it leaves for its layers is its own."""

import sys
import threading
from types import FrameType

from torch import nn


class Turn:
    """Belongs to one thread at a time, from the beginning of a forward to its end.

    A forward that was interrupted (Ctrl-C) never ends: whoever holds a turn and runs no module has lost it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._owner: int | None = None

    @property
    def is_held_here(self) -> bool:
        """Whether it is this thread's turn."""
        return self._owner == threading.get_ident()

    def take(self) -> None:
        """Wait until no other thread is in a forward."""
        with self._changed:
            while self._owner not in (None, threading.get_ident()) and self._is_held():
                self._changed.wait(timeout=0.1)
            self._owner = threading.get_ident()

    def give(self) -> bool:
        """Let the next thread in; return False if it was not this thread's turn."""
        with self._changed:
            held = self.is_held_here
            if held:
                self._owner = None
                self._changed.notify_all()
            return held

    def _is_held(self) -> bool:
        return self._owner is not None and runs_module(sys._current_frames().get(self._owner))


def runs_module(frame: FrameType | None) -> bool:
    """Return True if a module is being called in this frame or in one that called it."""
    while frame and frame.f_code is not nn.Module._call_impl.__code__:
        frame = frame.f_back
    return frame is not None
