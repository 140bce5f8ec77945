"""Gradient checkpointing runs forwards again in a backward: what runs again gets the state of the forward it repeats.

Autograd numbers its nodes as they are made. The node that a backward is at was made in the forward that is repeated,
so its number tells which one that was, whatever checkpointed it, wherever its inputs were kept, and whatever ran in
between. A reentrant checkpoint around a whole forward makes its one node just before.
"""

import collections
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointFunction

MOST_FORWARDS = 1024
"""Forwards that are remembered, with a few small tensors each."""
MOST_WITHOUT_NODES = 16
"""Of forwards that make no nodes one after the other, as in inference, only so many are remembered."""

State = TypeVar("State")


class _Life:
    """Held by a node of the graph."""


@dataclass(eq=False)
class Ran(Generic[State]):
    """A forward that ran.

    Attributes:
        state: what it left for its layers.
        timestep: that it was given.
        thread: in which it ran.
        again: whether it ran in a backward itself.
        begin: number of the first node that it made.
        end: of the first behind it; None while it runs.
        graph: an object that lives as long as the graph of its output, if that has one.
    """

    state: State
    timestep: Tensor
    thread: int
    again: bool
    begin: int
    end: int | None = None
    graph: Callable[[], object] = lambda: None

    def over(self, output: Any) -> None:
        """Note that it is over."""
        self.end = torch.autograd._get_sequence_nr()
        leaves = tree_leaves(output) if torch.is_grad_enabled() else []
        node: Any = next((leaf.grad_fn for leaf in leaves if isinstance(leaf, Tensor) and leaf.grad_fn), None)
        if node is not None:
            life = _Life()
            node.metadata[_Life] = life
            self.graph = weakref.ref(life)


class Recomputation(Generic[State]):
    """Remembers the states of forwards, and finds the one that a backward repeats."""

    def __init__(self) -> None:
        self._ran: collections.deque[Ran[State]] = collections.deque(maxlen=MOST_FORWARDS)

    def remember(self, state: State, timestep: Tensor) -> Ran[State]:
        """Remember the forward that begins."""
        begin = torch.autograd._get_sequence_nr()
        ran = Ran(state, timestep.detach().clone(), threading.get_ident(), in_backward(), begin)
        latest = self._remembered()[-MOST_WITHOUT_NODES:]
        if len(latest) == MOST_WITHOUT_NODES and all(
            one.begin == begin and one.thread == ran.thread for one in latest
        ):
            self._ran.remove(latest[0])
        self._ran.append(ran)
        return ran

    @property
    def awaited(self) -> bool:
        """Whether the graph of any forward is alive: its backward may come."""
        return any(ran.graph() is not None for ran in self._remembered())

    def of_layer(self) -> State | None:
        """Find the forward that a layer repeats; None if nothing tells."""
        found = _latest(self._at(_node()))
        return None if found is None else found.state

    def of_forward(self, timestep: Tensor) -> State | None:
        """Find the forward that one with this timestep repeats; None if nothing tells.

        Several may be checkpointed as one. Whatever node the backward is at, the first of them runs again first.
        """
        node = _node()
        inside = _latest(self._at(node))
        candidates = self._just_behind(node)
        if inside is not None:
            candidates = [
                ran for ran in self._remembered() if ran.thread == inside.thread and ran.begin <= inside.begin
            ]
        same = [ran for ran in candidates if _same(ran.timestep, timestep)]
        return None if not same else (same[-1] if inside is not None else same[0]).state

    def _remembered(self) -> tuple[Ran[State], ...]:
        """List the forwards in turn: a copy, as other threads may remember theirs meanwhile."""
        return tuple(self._ran)

    def _at(self, node: Any) -> list[Ran[State]]:
        """List the forwards that made a node."""
        if node is None:
            return []
        number, again = node._sequence_nr(), _is_nested(node)
        over = (ran for ran in self._remembered() if ran.again == again and ran.end is not None)
        return [ran for ran in over if ran.begin <= number < (ran.end or 0)]

    def _just_behind(self, node: Any) -> list[Ran[State]]:
        """List the forwards that began when a node had just been made."""
        if node is None:
            return []
        again = _is_nested(node)
        return [ran for ran in self._remembered() if ran.again == again and ran.begin == node._sequence_nr() + 1]


def in_backward() -> bool:
    """Return True if this thread runs in a backward."""
    return torch._C._current_graph_task_id() != -1


def _node() -> Any:
    return torch._C._current_autograd_node() if in_backward() else None


def _latest(found: "list[Ran[State]]") -> "Ran[State] | None":
    """Choose the innermost of forwards that made a node, in this thread if it made one: every thread counts its own.

    None if forwards of several other threads made one of that number.
    """
    own = [ran for ran in found if ran.thread == threading.get_ident()]
    if not own and len({ran.thread for ran in found}) > 1:
        return None
    return next(reversed(own or found), None)


@torch.compiler.disable
def _is_nested(node: Any) -> bool:
    """Return True if what a reentrant checkpoint ran again made a node, whose backward runs within its own."""
    frame: FrameType | None = sys._getframe()
    depth = 0
    while frame:
        depth += frame.f_code is CheckpointFunction.backward.__code__
        frame = frame.f_back
    return depth > (node.name() == f"{CheckpointFunction.__name__}Backward")


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.device == other.device and bool((one == other).all())
