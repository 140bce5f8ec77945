"""Which step of which run is this? The pipeline's scheduler tells, without waiting for the GPU."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..families.locate.reading import read_once


@dataclass(frozen=True)
class Moment:
    """A step of a run.

    Attributes:
        run: the scheduler's timesteps: a run is what one call of its `set_timesteps` begins.
        step: index into them.
        begin: the step that the run began with; video to video begins in the middle.
        timesteps: their values.
    """

    run: Tensor
    step: int
    begin: int
    timesteps: tuple[float, ...]

    def is_step_of(self, other: "Moment | None") -> bool:
        """Return True if both are the same step of the same run."""
        return other is not None and self.run is other.run and self.step == other.step


class Clock:
    """Tells the moment of a forward. All transformers of a pipeline share one, as they share one scheduler.

    The scheduler is the one that the pipeline has at the moment, or that it had last if the pipeline is gone and
    another one has its parts. Where it counts no steps (DDIM has no `step_index`; diffusion forcing steps copies of
    its scheduler, and Helios' distilled one never counts), the step is the one whose timestep is nearest to the
    forward's largest, and a run begins with the first step that was noted of it, which comes late if draft attention
    is enabled in the middle. Under diffusion forcing a forward is thus as far as the noisiest of its frames.

    Args:
        pipe: a pipeline, or anything else: a transformer alone has no scheduler.
        scheduler_units: whether the model gets timesteps as its scheduler counts them.
    """

    def __init__(self, pipe: Any, *, scheduler_units: bool = True) -> None:
        self._pipe = weakref.ref(pipe)
        self._last_scheduler = _weakly(getattr(pipe, "scheduler", None))
        self._scheduler_units = scheduler_units
        self._begun = WeakTensorKeyDictionary()

    def at(self, timestep: Tensor) -> Moment | None:
        """Tell the moment of a forward; None where no scheduler tells it.

        Args:
            timestep: the forward's argument, any shape, in the scheduler's units. It is read, which waits for the
                GPU, where the scheduler does not know the step: before a run's first step unless the pipeline has
                told it where the run begins, and if it counts no steps.
        """
        scheduler = self._scheduler()
        if scheduler is None:
            return None
        run = scheduler.timesteps
        timesteps = _values(run)
        step = self._step(scheduler, timestep, timesteps)
        return Moment(run, step, self._begin(scheduler, step), timesteps)

    def note(self, moment: Moment | None) -> None:
        """Remember where a run began, when its first forward comes."""
        if moment is not None:
            self._begun[moment.run] = moment.begin

    def _begin(self, scheduler: Any, step: int) -> int:
        if scheduler.timesteps in self._begun:
            return min(self._begun[scheduler.timesteps], step)  # a first step that was only guessed may be too late
        counting = getattr(scheduler, "step_index", None) is not None
        return getattr(scheduler, "begin_index", None) or (0 if counting else step)

    def _step(self, scheduler: Any, timestep: Tensor, timesteps: tuple[float, ...]) -> int:
        if not hasattr(scheduler, "step_index"):
            return _nearest(timestep, timesteps)
        if scheduler.step_index is not None:
            return scheduler.step_index
        if scheduler.begin_index is not None:
            return scheduler.begin_index
        # Video-to-video runs start in the middle, and not every pipeline tells the scheduler so.
        return _nearest(timestep, timesteps) if self._scheduler_units else 0

    def _scheduler(self) -> Any | None:
        """Get the scheduler, if it can tell the step."""
        pipe = self._pipe()
        if pipe is not None:
            self._last_scheduler = _weakly(getattr(pipe, "scheduler", None))
        scheduler = self._last_scheduler()
        counts = self._scheduler_units or hasattr(scheduler, "step_index")
        return scheduler if counts and isinstance(getattr(scheduler, "timesteps", None), torch.Tensor) else None


@read_once
def _values(timesteps: Tensor) -> tuple[float, ...]:
    return tuple(timesteps.tolist())


def _nearest(timestep: Tensor, timesteps: tuple[float, ...]) -> int:
    """Find the step whose timestep is nearest: models may get it rounded to their dtype.

    Of equal ones it is the second, as for diffusers' schedulers: those of second order have all but the first twice.
    """
    value = float(timestep.max())
    first = min(range(len(timesteps)), key=lambda step: abs(timesteps[step] - value))
    later = (step for step in range(first + 1, len(timesteps)) if timesteps[step] == timesteps[first])
    return next(later, first)


def _weakly(thing: Any) -> Callable[[], Any]:
    return (lambda: None) if thing is None else weakref.ref(thing)
