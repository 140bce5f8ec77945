"""What a transformer's forward leaves for its attention layers, and how to look into their calls."""

import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..attention.method import Method
from ..attention.ops import Attended
from .records import LayerRecord
from .turn import Turn


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
        self.layer = LayerRecord("")
        self.hook: Hook | None = None

    def copied(self) -> "LayerState":
        """Copy what layers read, and nothing else of a `Forward`."""
        state = LayerState()
        state.__dict__.update({name: self.__dict__[name] for name in state.__dict__})
        return state


class Forward(LayerState):
    """State of a transformer for its life: the running forward, and the settings in force.

    Attributes:
        attached: whether settings are in force.
        open: whether a forward is running.
        turn: whose it is.
        ranks: that share it, where it is split over GPUs.
        recomputed: states of forwards that backwards are running again, by thread.
    """

    def __init__(self) -> None:
        super().__init__()
        self.attached = False
        self.open = False
        self.turn = Turn()
        self.ranks: dist.ProcessGroup | None = None
        self.recomputed: dict[int, LayerState] = {}

    def here(self) -> LayerState:
        """Get the state for a layer that is called now, in this thread."""
        if torch.compiler.is_compiling() or not self.recomputed:
            return self
        return self.recomputed.get(threading.get_ident(), self)

    def enter(self, layer: LayerRecord) -> None:
        """Note which layer is about to run.

        Raises:
            RuntimeError: if it runs outside of the transformer's forward, whose grid is unknown then, or is exported.
        """
        check_not_exporting()
        state = self.here()
        if state is not self:
            state.layer = LayerRecord(layer.path)  # what happened in the forward itself stays
            return
        if self.attached and not (self.open and (torch.compiler.is_compiling() or self.turn.is_held_here)):
            raise RuntimeError(_strayed(layer))
        self.layer = layer
        layer.ran = "dense"

    def begin(self) -> None:
        """Wait for this thread's turn; what was recomputed in it before is over."""
        self.turn.take()
        self.recomputed.pop(threading.get_ident(), None)
        self.open = True

    def end(self) -> bool:
        """Note that this thread's forward is over; return False if there was none."""
        if not self.turn.is_held_here:
            return False
        self.open = False
        return self.turn.give()


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
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        return (
            f"A backward runs the layer {layer.path} again, and nothing tells for which forward. Checkpoint whole "
            "blocks, as transformer.enable_gradient_checkpointing() does, or disable draft attention first."
        )
    return (
        f"The layer {layer.path} was called outside of its transformer's forward, which tells it the grid. Call the "
        "transformer itself, not its blocks nor its method forward, or disable draft attention first."
    )
