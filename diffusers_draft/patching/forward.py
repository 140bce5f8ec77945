"""What a transformer's forward leaves for its attention layers, and how to look into their calls."""

import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..attention.method import Method
from ..attention.ops import Attended
from .records import LayerRecord


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


class Forward:
    """State of a transformer for its life: the running forward, and the settings in force.

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
        running: ids of the threads that are in a forward.
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
        self.running: list[int] = []
        self.forwards_to_recompute = 0
        self.recomputed = False

    def enter(self, layer: LayerRecord) -> None:
        """Note which layer is about to run.

        Raises:
            RuntimeError: when gradient checkpointing recomputes a forward whose state a later one has replaced.
        """
        self.layer = layer
        layer.ran = "dense"
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:  # not in a backward
            return
        if self.forwards_to_recompute > 1:
            raise RuntimeError(
                f"{self.forwards_to_recompute} forwards ran before this backward. Under gradient checkpointing draft "
                "attention can recompute only the latest: run backward after each forward, or disable one of the two."
            )
        self.recomputed = True

    def will_be_recomputed(self) -> None:
        """Note that gradient checkpointing will run this forward's layers again."""
        self.forwards_to_recompute = 1 if self.recomputed else self.forwards_to_recompute + 1
        self.recomputed = False

    def forget_recomputation(self) -> None:
        """Forget forwards whose backward never came."""
        self.forwards_to_recompute, self.recomputed = 0, False

    def begin(self) -> None:
        """Note that this thread is in a forward, and in none that was interrupted."""
        self.end()
        self.running.append(threading.get_ident())

    def end(self) -> None:
        """Note that this thread's forward is over."""
        if threading.get_ident() in self.running:
            self.running.remove(threading.get_ident())

    @property
    def runs_here(self) -> bool:
        """Whether this thread is in a forward."""
        return threading.get_ident() in self.running
