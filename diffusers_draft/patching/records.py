"""What happened: written by forwards and their layers, read by the report."""

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from .schedule import SparseStep


class SparseCall(NamedTuple):
    """What one sparse attention call leaves, on the device.

    Attributes:
        kv_len: `(B,)` leading valid keys or None.
        pairs: as `attention.ops.Attended` has it.
        squares: likewise.
        facts: likewise.
    """

    kv_len: Tensor | None
    pairs: Tensor
    squares: Tensor
    facts: Tensor


class LayerRecord:
    """What happened in one layer.

    Attributes:
        path: its module path.
        ran: how it ran in this forward: `"sparse"`, `"dense"`, `"mask"` (dense because of a mask that draft attention
            cannot honour), or `""` if it has not.
        call: its last sparse call, None before the first one.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.ran = ""
        self.call: SparseCall | None = None


class SparseForward(NamedTuple):
    """The sparse calls of one forward.

    Attributes:
        number: of the run's step; where no run is known, how many forwards came before this one.
        step: what it was to do.
        calls: by module path of the layer.
        mostly_ran: False if a cache had the results of more layers than ran: the errors of few layers are not the
            forward's.
    """

    number: int
    step: SparseStep
    calls: dict[str, SparseCall]
    mostly_ran: bool


def _zeros(*names: str) -> dict[str, int]:
    return dict.fromkeys(names, 0)


@dataclass
class Counts:
    """What happened so far.

    Attributes:
        steps: denoising steps, `"dense"` and `"sparse"` by the schedule.
        forwards: likewise.
        skipped_forwards: those of them in which no layer of draft attention ran: a cache had the result.
        calls: attention calls by what became of them, see `TransformerReport.dense_calls`; `"skipped"` are those that
            did not happen.
    """

    steps: dict[str, int] = field(default_factory=lambda: _zeros("dense", "sparse"))
    forwards: dict[str, int] = field(default_factory=lambda: _zeros("dense", "sparse"))
    skipped_forwards: int = 0
    calls: dict[str, int] = field(
        default_factory=lambda: _zeros("sparse", "step", "layer", "mask", "replacement", "skipped")
    )
