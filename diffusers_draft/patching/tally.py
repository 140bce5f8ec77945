"""Counts what happens in a transformer, forward by forward."""

import collections
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.utils.weak import WeakTensorKeyDictionary

from .clock import Moment
from .records import Counts, LayerRecord, SparseCall, SparseForward
from .schedule import SparseStep

MOST_FORWARDS = 512
"""Sparse forwards of a run that are remembered: each holds small tensors of every layer on the device."""


class _RunLog:
    """Sparse forwards of a run. It must not hold the run's timesteps, with which it is to end.

    Attributes:
        forwards: the last of them.
        step: that its latest forward was of, also if that was dense; None where no run is known.
    """

    def __init__(self) -> None:
        self.forwards: collections.deque[SparseForward] = collections.deque(maxlen=MOST_FORWARDS)
        self.step: int | None = None


class _Running(NamedTuple):
    """A forward that is being counted.

    Attributes:
        number: as `SparseForward` has it.
        step: what it is to do, None if it is dense.
        replaced: layers whose processor somebody has replaced.
        run: what it is of.
        around: how the layers had run, and what their last sparse calls left, by path, of the forward that it runs
            within.
    """

    number: int
    step: SparseStep | None
    replaced: int
    run: _RunLog
    around: dict[str, tuple[str, SparseCall | None]]


class Tally:
    """What happened in one transformer with one group of settings.

    Args:
        sparse_layers: module paths of the patched layers, in execution order.
        dense_layers: how many layers were left alone.

    Attributes:
        records: of each sparse layer, by module path.
        counts: what happened so far.
    """

    def __init__(self, sparse_layers: Iterable[str], dense_layers: int) -> None:
        self.records = {path: LayerRecord(path) for path in sparse_layers}
        self.counts = Counts()
        self._dense_layers = dense_layers
        self._runs = WeakTensorKeyDictionary()
        self._run = _RunLog()
        self._running: list[_Running] = []

    @property
    def log(self) -> tuple[SparseForward, ...]:
        """Sparse forwards of the run that had the latest one."""
        return tuple(self._run.forwards)

    def begin(self, depth: int, moment: Moment | None, step: SparseStep | None, replaced: int) -> None:
        """Count one forward and, when the scheduler has moved on, one step.

        Args:
            depth: forwards that run by now, each within the one before.
            moment: of this one, None if unknown.
            step: what it is to do, None if it is dense.
            replaced: layers whose processor somebody has replaced.
        """
        del self._running[depth - 1 :]  # what was interrupted never ended
        around = {path: (one.ran, one.call) for path, one in self.records.items()} if self._running else {}
        if moment is not None:  # runs may take turns
            self._run = self._runs.setdefault(moment.run, _RunLog())
        elif self._run.step is not None:  # nothing tells where such runs begin: what comes until a known one is one
            self._run = _RunLog()
        now = None if moment is None else moment.step
        number = sum(self.counts.forwards.values()) if now is None else now
        self._running.append(_Running(number, step, replaced, self._run, around))
        kind = "sparse" if step else "dense"
        self.counts.forwards[kind] += 1
        self.counts.calls["replacement"] += replaced if step else 0
        if now is None or now != self._run.step:
            self.counts.steps[kind] += 1
        self._run.step = now
        for record in self.records.values():
            record.ran = ""

    def end(self, failed: bool, ranks: dist.ProcessGroup | None) -> SparseForward | None:
        """Count the calls of the forward that is over, and keep what its sparse ones left.

        Args:
            failed: whether it ended with an error.
            ranks: that have measured the errors of a share of the heads each.

        Returns:
            Its sparse calls; None if it had none, or failed.
        """
        forward = self._running.pop()
        skipped = self._count_calls(forward, failed)
        calls = {path: one.call for path, one in self.records.items() if one.call and one.ran == "sparse"}
        for path, (ran, call) in forward.around.items():
            self.records[path].ran, self.records[path].call = ran, call
        if failed or not forward.step or not calls:
            return None
        left = _of_all_heads(calls, ranks) if ranks else calls
        found = SparseForward(forward.number, forward.step, left, mostly_ran=len(calls) >= skipped)
        forward.run.forwards.append(found)
        return found

    def _count_calls(self, forward: _Running, failed: bool) -> int:
        """Count the calls of a forward that is over; return how many did not happen."""
        ran = collections.Counter(record.ran for record in self.records.values())
        counts = self.counts
        counts.calls["sparse"] += ran["sparse"]
        counts.calls["step"] += 0 if forward.step else ran["dense"]
        counts.calls["mask"] += ran["mask"]
        if failed:  # layers that it did not reach were not skipped
            return 0
        skipped = max(0, ran[""] - forward.replaced)  # what replaced ours may call it
        counts.calls["skipped"] += skipped
        if len(self.records) == ran[""] > 0 and not forward.replaced:
            counts.skipped_forwards += 1
        else:
            counts.calls["layer"] += self._dense_layers
        return skipped


def _of_all_heads(calls: dict[str, SparseCall], ranks: dist.ProcessGroup) -> dict[str, SparseCall]:
    """Add up what the ranks have measured, all layers in one exchange."""
    squares = torch.stack([call.squares for call in calls.values()])
    dist.all_reduce(squares, group=ranks)
    return {path: call._replace(squares=row) for (path, call), row in zip(calls.items(), squares, strict=True)}
