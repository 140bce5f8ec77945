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
        layers: that had draft attention.
    """

    def __init__(self, forward: Forward, layers: Iterable[nn.Module]) -> None:
        self._forward = weakref.ref(forward)
        self._handles = [layer.register_forward_pre_hook(self) for layer in layers]

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Go, if no graph is left.

        Raises:
            RuntimeError: if a backward runs a layer again that was sparse.
        """
        forward = self._forward()
        if torch.compiler.is_compiling():
            return
        if forward is None or not forward.is_awaited:
            self.remove()
        elif in_backward() and forward.was_sparse:
            raise RuntimeError(
                "A backward runs attention layers again that were sparse, and draft attention was disabled before the "
                "backward. Leave it on until the backward is over."
            )

    def remove(self) -> None:
        """Take the hooks away."""
        while self._handles:
            self._handles.pop().remove()
