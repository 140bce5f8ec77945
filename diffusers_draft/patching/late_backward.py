"""Refuses to run layers again, for a backward, that have lost draft attention since their forward."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .forward import Forward
from .recomputation import in_backward
from .stock_when_copied import StockWhenCopied


class LateBackward(StockWhenCopied):
    """A forward pre-hook of layers that have their stock processors back while a graph of theirs is alive.

    Without it a reentrant checkpoint would run them again dense, and gradients would be wrong in silence.

    Args:
        forward: remembers those forwards.
    """

    def __init__(self, forward: Forward) -> None:
        self._forward = weakref.ref(forward)
        self._handles: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()

    def watch(self, layers: Iterable[nn.Module]) -> None:
        """Begin with layers that had draft attention."""
        for layer in layers:
            if layer not in self._handles:
                self._handles[layer] = layer.register_forward_pre_hook(self)

    def leave(self, layers: Iterable[nn.Module]) -> None:
        """Take the hooks of some layers away."""
        for layer in layers:
            if (handle := self._handles.pop(layer, None)) is not None:
                handle.remove()

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Go, if no graph is left.

        Raises:
            RuntimeError: if a backward runs a layer again that was sparse.
        """
        forward = self._forward()
        if torch.compiler.is_compiling():
            return
        if forward is None or not forward.is_awaited:
            self.leave(list(self._handles))
        elif in_backward() and forward.was_sparse:
            raise RuntimeError(
                "A backward runs attention layers again that were sparse, and draft attention was disabled before the "
                "backward, at least there. Leave it on until the backward is over."
            )
