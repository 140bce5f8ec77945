"""One knob in the user's words: the density of a run's steps to come follows the errors that it has measured.

The shape of the schedule stays; what is set is its scale, the mean density. Errors of layers and steps are not made
equal: early steps need small ones.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..schedules import Schedule as Shape
from .error_curve import ErrorCurve, Point

USUAL = ErrorCurve(level=-4.3, slope=0.8, drift=0.55, start=0.35, spread=(0.8, 0.2, 0.3, 1.0))
"""Before anything was measured: what first runs of the demo's model did best with, see docs/trials.md. Other models
may differ much."""
LAG = 2
"""A step goes by the errors of steps at least so many before it: the device may still be at those in between."""
SMALLEST = 1e-9
"""Error of a run in which nothing is skipped, so that it has a logarithm."""
MEMORY = 64
"""Steps that a loop without a known run goes by."""
RELUCTANCE = 0.2
"""While all of a run is to come, leaving the shape for densities lower by a factor is as bad as an error off by
`exp(RELUCTANCE log(factor)**2)`: 3 % for a third less, which costs little, and 10 % for half, which costs much."""
NARROWINGS = 30


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
    host = torch.empty(squares.shape, dtype=squares.dtype, device="cpu", pin_memory=True)
    with torch.cuda.device(squares.device):
        host.copy_(squares, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
    return host, event


@dataclass
class AskedStep:
    """A step whose density was chosen by errors.

    Attributes:
        mean: density of the run whose part it is.
        density: that was chosen.
        left: share of the run that was left when it began.
        readings: what its forwards have measured.
    """

    mean: float
    density: float
    left: float
    readings: list[Reading] = field(default_factory=list)

    def error(self) -> float | None:
        """Compute the mean of its forwards; None where nothing was measured."""
        errors = [reading.error for reading in self.readings if reading.error is not None]
        return sum(errors) / len(errors) if errors else None


class _Run:
    """A run as far as it has come.

    Args:
        start: what is known of errors when it begins.
        whole: whether all its steps are known, as those of a pipeline are.

    Attributes:
        at: its latest step, counted among the sparse ones.
        steps: those that had a sparse forward.
    """

    def __init__(self, start: ErrorCurve, whole: bool) -> None:
        self._start = start
        self._whole = whole
        self.at: int | None = None
        self.steps: list[AskedStep] = []

    def learned(self) -> ErrorCurve:
        """Tell what is known of errors after all its steps."""
        return self._start.fitted(_points(self.steps))

    def next_step(self, target: float, shape: Shape, left: Sequence[float], index: int, least: float) -> AskedStep:
        """Choose the density of its next step; see `Feedback.step`.

        The mean density is the one whose predicted errors bring the run nearest to the target. Becoming sparser than
        the steps so far counts against it: where those were too dense for the target, the ones to come would leave the
        shape to make up for it, which costs more than a smaller error is worth, and the more the fewer pairs are left
        to be saved.
        """
        curve = self._start.fitted(_points(self._known()))
        ahead = range(index if self._whole else 0, len(left))
        before = self._errors(curve) if self._whole else []
        spent, goal = sum(before), target * (len(before) + len(ahead))

        def densities(mean: float) -> list[float]:
            return [max(least, density) for density in shape(mean, left)]

        kept = densities(self._mean_so_far()) if self._whole and self.steps else None
        reluctance = RELUCTANCE**2 / self._to_come([kept[step] for step in ahead]) if kept else 0.0

        def cost(logarithm: float) -> float:
            chosen = densities(math.exp(logarithm))
            errors = spent + sum(curve.error(chosen[step], left[step]) for step in ahead)
            missed = math.log(max(errors, SMALLEST) / goal) ** 2
            if kept is None:
                return missed
            sparser = sum(max(0.0, math.log(kept[step] / chosen[step])) ** 4 for step in ahead)
            return missed + reluctance * sparser / len(ahead)

        mean = math.exp(_lowest(cost, math.log(least), 0.0))
        self.at = index
        self.steps.append(AskedStep(mean, densities(mean)[index], left[index]))
        if not self._whole:
            del self.steps[:-MEMORY]
        return self.steps[-1]

    def _mean_so_far(self) -> float:
        """Average the means that its steps were parts of, by their densities."""
        total = sum(step.density for step in self.steps)
        return math.exp(sum(step.density * math.log(step.mean) for step in self.steps) / total)

    def _to_come(self, densities: Sequence[float]) -> float:
        """Compute which share of a run's pairs is to be computed yet, if the steps to come have these densities."""
        return sum(densities) / (sum(densities) + sum(step.density for step in self.steps))

    def _known(self) -> list[AskedStep]:
        return self.steps[: max(0, len(self.steps) - LAG + 1)]

    def _errors(self, curve: ErrorCurve) -> list[float]:
        """List the errors of its steps but those that a cache skipped; as predicted where they are not known yet."""
        known = self._known()
        measured = [error for step in known if (error := step.error()) is not None]
        return measured + [curve.error(step.density, step.left) for step in self.steps[len(known) :]]


class Feedback:
    """Sets the density of every step so that the mean error of a run arrives at a target.

    A run begins with what the one before it has learned. Runs may take turns, as those of several requests do.

    Args:
        target: mean over a run's sparse steps of the mean over layers of the relative error after correction.
        shape: of the densities over the run.
    """

    def __init__(self, target: float, shape: Shape) -> None:
        self._target = target
        self._shape = shape
        self._runs = WeakTensorKeyDictionary()
        self._unknown: _Run | None = None
        self._latest: _Run | None = None

    def step(self, run: Tensor | None, left: Sequence[float], index: int, least: float) -> AskedStep:
        """Choose the density of a step; whoever runs it adds what its forwards measure.

        Args:
            run: its timesteps, which tell runs apart; None where no run is known, and every step goes by what was
                measured so far.
            left: share of the run that is left at each of its sparse steps.
            index: of the step among them. A step's later forwards get the density of its first; where no run is
                known, each is a step.
            least: the least density that there can be.
        """
        current = self._latest = self._run_of(run, index)
        if run is not None and index == current.at:
            return current.steps[-1]
        return current.next_step(self._target, self._shape, left, index, least)

    def _run_of(self, run: Tensor | None, index: int) -> _Run:
        """Find a run, or begin it with all that the latest one has taught."""
        found: _Run | None = self._unknown if run is None else self._runs.get(run)
        if found is None or (run is not None and found.at is not None and index < found.at):
            found = _Run(self._latest.learned() if self._latest else USUAL, whole=run is not None)
            if run is None:
                self._unknown = found
            else:
                self._runs[run] = found
        return found


def _points(steps: Iterable[AskedStep]) -> list[Point]:
    measured = ((step, step.error()) for step in steps)
    return [Point(step.density, step.left, error) for step, error in measured if error is not None]


def _lowest(cost: Callable[[float], float], low: float, high: float) -> float:
    """Find where a cost that falls and then rises is lowest, by golden sections."""
    share = (math.sqrt(5) - 1) / 2
    left, right = high - share * (high - low), low + share * (high - low)
    at_left, at_right = cost(left), cost(right)
    for _ in range(NARROWINGS):
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - share * (high - low)
            at_left = cost(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + share * (high - low)
            at_right = cost(right)
    return (low + high) / 2
