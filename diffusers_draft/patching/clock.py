"""Which step of which run is this? The pipeline's scheduler tells, without waiting for the GPU."""

import math
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple

import torch
from diffusers import ConfigMixin
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..families.locate.reading import read_once

ROUNDING = 1.0
"""How far a forward's timestep may lie from its scheduler's: loops round to whole ones."""


@dataclass(frozen=True)
class Moment:
    """A step of a run.

    Attributes:
        run: the scheduler's timesteps: a run is what one call of its `set_timesteps` begins.
        step: index into them.
        begin: the step that the run began with; video to video begins in the middle.
        timesteps: their values.
        joined: the first step that was noted: later than `begin` if draft attention was enabled in the middle, or
            another transformer had the steps before.
    """

    run: Tensor
    step: int
    begin: int
    timesteps: tuple[float, ...]
    joined: int


class _Noted(NamedTuple):
    """What is remembered of a run: not its timesteps, which it is to end with."""

    begin: int
    joined: int
    step: int


class Clock:
    """Tells the moment of a forward. All transformers of a pipeline share one, as they share one scheduler.

    The scheduler is that of the diffusers pipeline whose method calls the forward, found on the Python stack: one
    transformer may be in many pipelines, and each may get a new scheduler at any time. Where none calls (a loop of
    one's own, training), the scheduler is that of the pipeline that draft attention was enabled on, or that it had
    last if it is gone. It is believed if it is in the middle of a run and at the forward's timestep; otherwise nothing
    tells. Comparing waits for a GPU, so that a calling pipeline is believed unless the timestep is on the CPU.

    Where the scheduler counts no steps (DDIM has no `step_index`; diffusion forcing steps copies of its scheduler, and
    Helios' distilled one never counts), the step is the one whose timestep is nearest to the forward's largest, and a
    run begins with the first step that was noted of it, which comes late if draft attention is enabled in the middle.
    Under diffusion forcing a forward is thus as far as the noisiest of its frames. Where no pipeline calls either, the
    timesteps of a training must not be taken for a run, see `_goes_on`.

    Args:
        pipe: a pipeline, or anything else: a transformer alone has no scheduler.
        scheduler_units: whether the model gets timesteps as its scheduler counts them.
    """

    def __init__(self, pipe: Any, *, scheduler_units: bool = True) -> None:
        self._pipe = weakref.ref(pipe)
        self._last_scheduler = _weakly(getattr(pipe, "scheduler", None))
        self._scheduler_units = scheduler_units
        self._noted = WeakTensorKeyDictionary()

    def at(self, timestep: Tensor) -> Moment | None:
        """Tell the moment of a forward; None where no scheduler tells it.

        Args:
            timestep: the forward's argument, any shape, in the scheduler's units. It is read, which waits for the
                GPU, where the scheduler does not know the step: before a run's first step unless the pipeline has
                told it where the run begins, and if it counts no steps; and where no pipeline calls.
        """
        pipe = _calling_pipeline(sys._getframe())
        scheduler: Any = self._known_scheduler() if pipe is None else pipe.scheduler
        if not self._tells(scheduler) or (pipe is None and timestep.device.type == "meta"):
            return None
        run = scheduler.timesteps
        timesteps = _values(run)
        step = self._step(scheduler, timestep, timesteps)
        if pipe is None and (step >= len(timesteps) or not self._goes_on(scheduler, step)):
            return None
        expected = timesteps[min(step, len(timesteps) - 1)]
        if self._compares(pipe, scheduler, timestep) and not _is_at(timestep, expected):
            return None
        noted: _Noted | None = self._noted.get(run)
        begin, joined = (noted.begin, noted.joined) if noted else (self._begin(pipe, scheduler, step), step)
        # A first step that was only guessed may be too late.
        return Moment(run, step, min(begin, step), timesteps, min(joined, step))

    def note(self, moment: Moment | None) -> None:
        """Remember where a run began, when its first forward comes, and how far it is."""
        if moment is not None:
            self._noted[moment.run] = _Noted(moment.begin, moment.joined, moment.step)

    def _begin(self, pipe: Any | None, scheduler: Any, step: int) -> int:
        """Tell where a run begins whose first forward this is."""
        begin = getattr(scheduler, "begin_index", None)
        if begin is not None:
            return begin
        if not _counts(scheduler):
            return step
        # Noise was added with it before, in video to video, or this is not its first forward.
        steps = getattr(pipe, "num_timesteps", None)
        return max(0, len(scheduler.timesteps) - steps) if isinstance(steps, int) else 0

    def _step(self, scheduler: Any, timestep: Tensor, timesteps: tuple[float, ...]) -> int:
        if not hasattr(scheduler, "step_index"):
            return _nearest(timestep, timesteps)
        if scheduler.step_index is not None:
            return scheduler.step_index
        if scheduler.begin_index is not None:
            return scheduler.begin_index
        # Video-to-video runs start in the middle, and not every pipeline tells the scheduler so.
        return _nearest(timestep, timesteps) if self._scheduler_units else 0

    def _known_scheduler(self) -> Any | None:
        pipe = self._pipe()
        if pipe is not None:
            self._last_scheduler = _weakly(getattr(pipe, "scheduler", None))
        return self._last_scheduler()

    def _tells(self, scheduler: Any) -> bool:
        """Return True if a scheduler can tell the step of a run."""
        counts = self._scheduler_units or hasattr(scheduler, "step_index")
        return counts and isinstance(getattr(scheduler, "timesteps", None), Tensor) and _is_set(scheduler)

    def _compares(self, pipe: Any | None, scheduler: Any, timestep: Tensor) -> bool:
        """Return True if a forward must be at the timestep of its scheduler's step."""
        if pipe is None:
            return self._scheduler_units
        return self._scheduler_units and _counts(scheduler) and _is_free_to_read(timestep)

    def _goes_on(self, scheduler: Any, step: int) -> bool:
        """Return True if a forward that no pipeline calls can be in a run, going by the order of its steps.

        A scheduler that has not counted may be at the first step of a loop, or never count; or it is not used, and
        some timestep of a training happens to be one of its own. Loops go forward, without gradients, and in steps
        that are further apart than timesteps are rounded.
        """
        if not self._scheduler_units:  # nothing can be compared
            return not torch.is_grad_enabled()
        if _counts(scheduler) or getattr(scheduler, "begin_index", None) is not None:
            return True
        if step == 0 and hasattr(scheduler, "step_index"):  # from the next step on it counts
            return True
        run = scheduler.timesteps
        if torch.is_grad_enabled() or 2 * ROUNDING * len(run) >= (_training_steps(scheduler) or math.inf):
            return False
        noted: _Noted | None = self._noted.get(run)
        return noted is None or step in (0, noted.begin) or step >= noted.step


def _calling_pipeline(frame: FrameType | None) -> Any | None:
    """Find the innermost diffusers pipeline, modular or not, whose method called this frame."""
    while frame:
        if frame.f_code.co_varnames[:1] == ("self",):
            caller = frame.f_locals.get("self")
            if isinstance(caller, ConfigMixin) and hasattr(caller, "scheduler"):
                return caller
        frame = frame.f_back
    return None


def _is_set(scheduler: Any) -> bool:
    """Return True if `set_timesteps` was called: a new scheduler has all the timesteps of its training."""
    if getattr(scheduler, "num_inference_steps", None) is not None:
        return True
    return len(scheduler.timesteps) != _training_steps(scheduler)


def _training_steps(scheduler: Any) -> int | None:
    return getattr(getattr(scheduler, "config", None), "num_train_timesteps", None)


def _counts(scheduler: Any) -> bool:
    """Return True if a scheduler has counted a step."""
    return getattr(scheduler, "step_index", None) is not None


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


def _is_free_to_read(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _is_at(timestep: Tensor, expected: float) -> bool:
    """Return True if a forward has this timestep, maybe rounded to its dtype."""
    dtype = timestep.dtype
    rounding = max(ROUNDING, torch.finfo(dtype).eps * abs(expected)) if dtype.is_floating_point else ROUNDING
    return abs(float(timestep.max()) - expected) <= rounding


def _weakly(thing: Any) -> Callable[[], Any]:
    return (lambda: None) if thing is None else weakref.ref(thing)
