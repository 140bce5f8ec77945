"""Gradient checkpointing runs blocks again in the backward: each gets the state of the forward that it belongs to."""

import itertools
import threading
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..families.family import Inputs
from .forward import Forward, LayerState
from .stock_when_copied import StockWhenCopied

Key = tuple[int, int]
"""A module, and the memory of what it was called with."""


class _Remembered(NamedTuple):
    memory: StorageWeakRef
    state: LayerState


class Recomputation(StockWhenCopied):
    """Remembers which forward every block ran in, by the memory of its input.

    Whatever checkpoints, torch or a wrapper, reentrant or not, keeps the inputs of what it will run again. So a module
    that is called in a backward with memory that it was called with in a forward recomputes that forward, and so does
    what this backward runs behind it. Modules are watched from the first forward that needs gradients.

    Args:
        forward: the state of the running forward.
        paths: module paths of the layers.
    """

    def __init__(self, forward: Forward, paths: tuple[str, ...]) -> None:
        self._forward = forward
        self._paths = paths
        self._handles: list[Any] = []
        self._remembered: dict[Key, _Remembered] = {}
        self._state: LayerState | None = None

    def remember(self, transformer: nn.Module, inputs: Inputs) -> None:
        """Remember the state of the forward that begins, if it needs gradients."""
        self._state = None
        if not torch.is_grad_enabled() or not _needs_gradients(transformer, inputs):
            return
        self._remembered = {key: entry for key, entry in self._remembered.items() if not entry.memory.expired()}
        self._state = self._forward.copied()
        if not self._handles:
            for module in _modules_on(transformer, self._paths):
                self._handles.append(module.register_forward_pre_hook(self, with_kwargs=True))

    def forget(self) -> None:
        """Stop watching."""
        while self._handles:
            self._handles.pop().remove()
        self._remembered.clear()
        self._state = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember a call, or find the one that it repeats: the forward pre-hook of a block or layer."""
        if torch.compiler.is_compiling():
            return
        in_backward = torch._C._current_graph_task_id() != -1
        if not in_backward and self._state is None:
            return
        memory = _memory(args, kwargs)
        if memory is None:
            return
        key = id(module), memory.cdata
        if not in_backward and self._state is not None:
            self._remembered[key] = _Remembered(memory, self._state)
        elif in_backward and key in self._remembered:
            self._forward.recomputed[threading.get_ident()] = self._remembered[key].state.copied()


def _modules_on(transformer: nn.Module, paths: tuple[str, ...]) -> Iterator[nn.Module]:
    """List the modules that contain the layers, and the layers, each once."""
    seen: weakref.WeakSet[nn.Module] = weakref.WeakSet([transformer])
    for path in paths:
        names = path.split(".")
        for end in range(1, len(names) + 1):
            module = transformer.get_submodule(".".join(names[:end]))
            if module not in seen and not isinstance(module, nn.ModuleList | nn.ModuleDict):
                seen.add(module)
                yield module


def _memory(args: tuple[Any, ...], kwargs: dict[str, Any]) -> StorageWeakRef | None:
    """Get the memory of the largest tensor: that of the tokens."""
    tensors = [thing for thing in (*args, *kwargs.values()) if isinstance(thing, Tensor)]
    largest = max(tensors, key=Tensor.numel, default=None)
    return None if largest is None else StorageWeakRef(largest.untyped_storage())


def _needs_gradients(transformer: nn.Module, inputs: Inputs) -> bool:
    given = (value for value in inputs.values() if isinstance(value, Tensor))
    return any(tensor.requires_grad for tensor in itertools.chain(given, transformer.parameters()))
