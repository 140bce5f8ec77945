"""One forward of a transformer after the other: what it leaves for its layers is its own."""

import contextlib
import sys
import threading
from collections.abc import Iterator
from types import FrameType

import torch
from torch import nn


class Turn:
    """Belongs to one thread at a time, from the beginning of a forward to its end.

    A forward that was interrupted (Ctrl-C) never ends: a thread that holds a turn and does not run the transformer has
    lost it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._owner: int | None = None

    @property
    def is_held_here(self) -> bool:
        """Whether it is this thread's turn."""
        return self._owner == threading.get_ident()

    def take(self, module: nn.Module) -> None:
        """Wait until no other thread is in a forward of a module."""
        with self.paused(module):
            self._owner = threading.get_ident()

    @contextlib.contextmanager
    def paused(self, module: nn.Module) -> Iterator[None]:
        """Wait until no other thread is in a forward of a module, and let none begin meanwhile."""
        with self._changed:
            while self._owner not in (None, threading.get_ident()) and self._is_held(module):
                self._changed.wait(timeout=0.1)
            yield

    def give(self) -> None:
        """Let the next thread in, if it is this thread's turn."""
        with self._changed:
            if self.is_held_here:
                self._owner = None
                self._changed.notify_all()

    def _is_held(self, module: nn.Module) -> bool:
        frame = None if self._owner is None else sys._current_frames().get(self._owner)
        return runs(module, frame)


# Past its limit of recompilations torch.compile runs code as it is, and tries to compile what that calls: not these.
@torch.compiler.disable
def runs(module: nn.Module | None, frame: FrameType | None) -> bool:
    """Return True if a module is being called in a frame, or if compiled code may hide that."""
    return calls_of(module, frame) > 0 or _runs_compiled_code(frame)


@torch.compiler.disable
def calls_of(module: nn.Module | None, frame: FrameType | None) -> int:
    """Count how often a module is being called in a frame and those that called it."""
    calls = 0
    while frame:
        if frame.f_code.co_name == nn.Module._call_impl.__name__ and module is not None:
            calls += frame.f_locals.get("self") is module
        frame = frame.f_back
    return calls


def _runs_compiled_code(frame: FrameType | None) -> bool:
    """Return True below `torch.compile`, where a module's call may have no frame of its own."""
    while frame and not frame.f_code.co_filename.endswith("_dynamo/eval_frame.py"):
        frame = frame.f_back
    return frame is not None
