"""One knob in the user's words: the density of a run's steps to come follows the errors that it has measured.

The shape of the schedule stays; what is set is its scale, the mean density. Errors of layers and steps are not made
equal: early steps need small ones.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..schedules import Schedule as Shape
from .error_curve import ErrorCurve, Point

USUAL = ErrorCurve(level=-1.2, slope=4.4, drift=0.7, spread=(1.0, 2.0, 1.0))
"""Before anything was measured: what docs/results/error_study.py found of the demo's model. Others may differ much."""
LAG = 2
"""A step goes by the errors of steps at least so many before it: the device may still be at those in between."""
MEMORY = 64
"""Steps that a loop without a known run goes by."""
HALVINGS = 30


class Reading:
    """The errors that a forward has measured, on their way from the device.

    Args:
        squares: of each layer's sparse call, as `attention.ops.Attended` has them, of all heads.
    """

    def __init__(self, squares: Iterable[Tensor]) -> None:
        by_device: dict[torch.device, list[Tensor]] = {}
        for vector in squares:
            by_device.setdefault(vector.device, []).append(vector.detach())
        self._parts = [_start(torch.stack(vectors)) for vectors in by_device.values()]

    @functools.cached_property
    def error(self) -> float | None:
        """Mean of the layers' relative errors, 0 for those that skipped nothing; None if none has a finite error.

        To read it waits for a device that is still behind: within a run one that has the whole step before the present
        one to do meanwhile, and when a run begins one that has not finished the last.
        """
        errors = []
        for host, event in self._parts:
            if event is not None:
                event.synchronize()
            errors += [math.sqrt(after / whole) if whole else 0.0 for _, after, whole in host.tolist()]
        finite = [error for error in errors if math.isfinite(error)]
        return sum(finite) / len(finite) if finite else None


def _start(squares: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    if squares.device.type != "cuda":
        return squares, None
    host = torch.empty(squares.shape, dtype=squares.dtype, pin_memory=True)
    with torch.cuda.device(squares.device):
        host.copy_(squares, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
    return host, event


@dataclass
class _Step:
    density: float
    left: float
    readings: list[Reading] = field(default_factory=list)

    def error(self) -> float | None:
        """Compute the mean of its forwards; None where nothing was measured."""
        errors = [reading.error for reading in self.readings if reading.error is not None]
        return sum(errors) / len(errors) if errors else None


class Feedback:
    """Sets the density of every step so that the mean error of a run arrives at a target.

    A run begins with what the one before it has learned.

    Args:
        target: mean over a run's sparse steps of the mean over layers of the relative error after correction.
        shape: of the densities over the run.
    """

    def __init__(self, target: float, shape: Shape) -> None:
        self._target = target
        self._shape = shape
        self._learned = USUAL
        self._run: Any = None
        self._at: int | None = None
        self._mean: float | None = None
        self._steps: list[_Step] = []

    def density(self, run: Any, left: Sequence[float], index: int, least: float) -> float:
        """Choose the density of a step.

        Args:
            run: what tells runs apart; None where no run is known, and every step goes by what was measured so far.
            left: share of the run that is left at each of its sparse steps.
            index: of the step among them. A step's later forwards get the density of its first.
            least: the least density that there can be.
        """
        if self._steps and run is self._run and index == self._at:
            return self._steps[-1].density
        if run is not self._run or (run is not None and self._at is not None and index < self._at):
            self._begin(run)
        curve = self._learned.fitted(_points(self._known()))
        budget = self._target * len(left) if run is None else self._budget(curve, len(left) - index)
        ahead = range(len(left)) if run is None else range(index, len(left))

        def densities(mean: float) -> list[float]:
            return [max(least, density) for density in self._shape(mean, left)]

        def too_much(mean: float) -> bool:
            chosen = densities(mean)
            return sum(curve.error(chosen[step], left[step]) for step in ahead) > budget

        self._mean = self._toward(_smallest(too_much, least), index, left)
        density = densities(self._mean)[index]
        self._at = index
        self._steps.append(_Step(density, left[index]))
        if run is None:
            del self._steps[:-MEMORY]
        return density

    def note(self, reading: Reading) -> None:
        """Remember what a forward of the latest step has measured."""
        self._steps[-1].readings.append(reading)

    def _begin(self, run: Any) -> None:
        """Begin a run with what all of the last one has taught."""
        self._learned = self._learned.fitted(_points(self._steps))
        self._run, self._at, self._mean, self._steps = run, None, None, []

    def _toward(self, mean: float, index: int, left: Sequence[float]) -> float:
        """Go to another mean, in the second half of a run less and less of the way.

        The last steps would otherwise leave the shape to make up for every small deviation before them.
        """
        if self._mean is None or self._run is None:
            return mean
        share = min(1.0, 2 * left[index] / left[0])
        return self._mean ** (1 - share) * mean**share

    def _known(self) -> list[_Step]:
        return self._steps[: max(0, len(self._steps) - LAG + 1)]

    def _budget(self, curve: ErrorCurve, ahead: int) -> float:
        """Compute the sum of errors that is left for the steps ahead. Steps that a cache skipped do not count."""
        known = [error for step in self._known() if (error := step.error()) is not None]
        underway = self._steps[len(self._known()) :]
        spent = sum(known) + sum(curve.error(step.density, step.left) for step in underway)
        return self._target * (len(known) + len(underway) + ahead) - spent


def _points(steps: Iterable[_Step]) -> list[Point]:
    measured = ((step, step.error()) for step in steps)
    return [Point(step.density, step.left, error) for step, error in measured if error is not None]


def _smallest(too_much: Callable[[float], bool], least: float) -> float:
    """Find the smallest mean density at which the error is not too much; 1 if it always is."""
    low, high = least, 1.0
    if not too_much(low):
        return low
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if too_much(middle) else (low, middle)
    return high
