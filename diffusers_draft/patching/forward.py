"""What a transformer's forward leaves for its attention layers, and how to look into their calls."""

import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..attention.method import Method
from ..attention.ops import Attended
from .recomputation import Ran, Recomputation, in_backward
from .records import LayerRecord
from .turn import Turn, calls_of, runs


class AttentionCall(NamedTuple):
    """One attention call as a hook sees it; `arguments` are those of `attention.ops.attend`."""

    query: Tensor
    key: Tensor
    value: Tensor
    geometry: Tensor
    kv_len: Tensor | None
    numbers: Tensor
    method: Tensor
    scale: float | None
    sparse: bool
    path: str

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor, float | None]:
        return self[0], self[1], self[2], self[3], self[4], self[5], self[6], self[7]


Hook = Callable[[AttentionCall], Attended | Tensor | None]
"""Looks into a call, and stands in for it if it returns something: all of `Attended`, or the output alone."""


class LayerState:
    """What a forward leaves for its layers.

    Compiled code reads bools and tensors of it alone, so that no layer, no resolution and no setting recompiles.

    Attributes:
        sparse: whether this forward attends sparsely.
        geometry: `(4,)` int64 on the CPU: T, Y, X and the prefix.
        kv_len: `(B,)` leading valid keys, or None where nothing is padded.
        numbers: as `attention.ops.attend` takes them.
        method: likewise.
        shared: where the forward is split over GPUs, an empty tensor as long as the sequence that they share.
        whole_text: whether every GPU has tokens behind those.
        paths: module paths of the layers that have draft attention.
        layer: the record of the layer that is running.
        hook: looks into every call of the patched layers, or stands in for it.
    """

    def __init__(self) -> None:
        self.sparse = False
        self.geometry = torch.zeros(4, dtype=torch.int64, device="cpu")
        self.kv_len: Tensor | None = None
        self.numbers = torch.zeros(2, dtype=torch.float64, device="cpu")
        self.method = Method().to_tensor()
        self.shared: Tensor | None = None
        self.whole_text = False
        self.paths: frozenset[str] = frozenset()
        self.layer = LayerRecord("")
        self.hook: Hook | None = None

    def copied(self) -> "LayerState":
        """Copy what layers read, and nothing else of a `Forward`."""
        state = LayerState()
        state.__dict__.update({name: self.__dict__[name] for name in state.__dict__})
        return state


class _Outer(NamedTuple):
    """What was there when a forward began."""

    state: LayerState
    open: bool
    again: bool
    ran: Ran[LayerState] | None


class Forward(LayerState):
    """State of a transformer for its life: the running forward, and the settings in force.

    Attributes:
        attached: whether settings are in force.
        open: whether a forward is running.
        again: whether it repeats an earlier one for a backward.
        turn: whose it is.
        ranks: that share it, where it is split over GPUs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.attached = False
        self.open = False
        self.again = False
        self.turn = Turn()
        self.ranks: dist.ProcessGroup | None = None
        self._recomputation: Recomputation[LayerState] = Recomputation()
        self._ran: Ran[LayerState] | None = None
        self._outer: list[_Outer] = []
        self._module: Callable[[], nn.Module | None] = lambda: None
        self._repeated = threading.local()

    @property
    def depth(self) -> int:
        """How many forwards are running, each within the one before."""
        return len(self._outer)

    @property
    def is_awaited(self) -> bool:
        """Whether a backward of an earlier forward may come."""
        return self._recomputation.awaited

    @property
    def was_sparse(self) -> bool:
        """Whether the layer that a backward runs again was sparse."""
        state = self._recomputation.of_layer()
        return state is not None and state.sparse

    def here(self) -> LayerState:
        """Get the state for a layer that is called now, in this thread."""
        if torch.compiler.is_compiling() or not in_backward() or self._runs_here():
            return self
        return getattr(self._repeated, "state", self)

    def enter(self, layer: LayerRecord) -> None:
        """Note which layer is about to run.

        Raises:
            RuntimeError: if it runs outside of the transformer's forward, whose grid is unknown then, or is exported.
        """
        check_not_exporting()
        if torch.compiler.is_compiling():
            if self.attached and not self.open:
                raise RuntimeError(_strayed(layer))
        elif not self._runs_here():
            self._enter_again(layer)
            return
        # What happened in the forward that is repeated stays.
        self.layer = LayerRecord(layer.path) if self.again else layer
        self.layer.ran = "dense"

    def begin(self, module: nn.Module) -> None:
        """Wait for this thread's turn."""
        self.turn.take(module)
        self._module = weakref.ref(module)
        del self._outer[max(0, calls_of(module, sys._getframe()) - 1) :]  # what was interrupted never ended
        self._outer.append(_Outer(self.copied(), self.open, self.again, self._ran))
        self.open, self.again = True, False

    def repeat(self, timestep: Tensor) -> bool:
        """Take the state of the forward that the one beginning repeats for a backward; return False if it does not."""
        state = self._recomputation.of_forward(timestep) if in_backward() else None
        if state is not None:
            self.again = True
            self.__dict__.update(state.copied().__dict__)
        return self.again

    def remember(self, timestep: Tensor) -> None:
        """Remember what the forward that begins leaves for its layers, should a backward repeat them."""
        self._ran = self._recomputation.remember(self.copied(), timestep)

    def end(self, output: Any = None) -> bool:
        """Note that this thread's forward is over; return False if there was none, or one that was a repetition."""
        if not self.turn.is_held_here or not self._outer:
            return False
        if self._ran is not None:
            self._ran.over(output)
        again, outer = self.again, self._outer.pop()
        if again or outer.open:
            self.__dict__.update(outer.state.__dict__)
        self.open, self.again, self._ran = bool(self._outer), outer.again, outer.ran
        return not again

    def leave(self) -> None:
        """Let other threads in, if this one is in no forward any more."""
        if not self._outer:
            self.turn.give()

    def _runs_here(self) -> bool:
        """Return True if this thread is in a forward of the transformer."""
        return self.open and self.turn.is_held_here and runs(self._module(), sys._getframe())

    def _enter_again(self, layer: LayerRecord) -> None:
        """Find the state for a layer that a backward runs again."""
        state = self._recomputation.of_layer() if in_backward() else None
        if state is None:
            self._repeated.__dict__.pop("state", None)
            if self.attached or in_backward():
                raise RuntimeError(_strayed(layer))
            self.layer = LayerRecord(layer.path)
            return
        self._repeated.state = state.copied()
        self._repeated.state.layer = LayerRecord(layer.path)
        self._repeated.state.sparse &= layer.path in state.paths  # it may have been in dense_layers


def check_not_exporting() -> None:
    """Raise RuntimeError under `torch.export` and `torch.jit.trace`: a graph would hold one step's state for ever."""
    # The flag itself: to a graph made by torch before 2.13, `is_exporting()` is always true.
    if torch.compiler._is_exporting_flag or torch.jit.is_tracing():
        raise RuntimeError(
            "Draft attention cannot be exported or traced: the graph would hold the grid and the density of one step. "
            "Disable it before torch.export or torch.jit.trace, and enable it on the transformer that runs."
        )


def _strayed(layer: LayerRecord) -> str:
    """Say why a layer's forward is unknown."""
    if not torch.compiler.is_compiling() and in_backward():
        return (
            f"A backward runs the layer {layer.path} again, and nothing tells for which forward. Checkpoint whole "
            "blocks, as transformer.enable_gradient_checkpointing() does, or disable draft attention first."
        )
    return (
        f"The layer {layer.path} was called outside of its transformer's forward, which tells it the grid. Call the "
        "transformer itself, not its blocks nor its method forward, or disable draft attention first."
    )
