"""Is this step dense? The answer comes from the pipeline's scheduler, without waiting for the GPU."""

import math
import warnings
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor


class Schedule:
    """The first steps of a run, where the video takes shape, stay dense.

    All transformers of a pipeline share one schedule, as they share one scheduler. It is the one that the pipeline
    has at the moment, or that it had last if the pipeline is gone and another one has its parts.

    A run is what one call of the scheduler's `set_timesteps` begins. Where the scheduler counts no steps (DDIM has no
    `step_index`; diffusion forcing steps copies of its scheduler, and Helios' distilled one never counts), the step is
    the one whose timestep is nearest to the forward's largest, and the share of a run is counted from the first
    forward that is seen of it, which comes late if draft attention is enabled in the middle. Under diffusion forcing
    a forward is thus dense as long as the noisiest of its frames is in the first steps of its own.

    Attributes:
        now: run and step of the latest forward; None where no scheduler tells them.
    """

    def __init__(
        self, pipe: Any, dense_steps: float | None, dense_timestep: float, *, scheduler_units: bool = True
    ) -> None:
        self._pipe = weakref.ref(pipe)
        self._last_scheduler = _weakly(getattr(pipe, "scheduler", None))
        self._dense_steps = dense_steps
        self._dense_timestep = dense_timestep
        self._scheduler_units = scheduler_units
        self._timesteps: Tensor | None = None
        self._values: list[float] = []
        self._dense_until = 0
        self._runs = 0
        self._warned = False
        self.now: tuple[int, int] | None = None
        if not hasattr(pipe, "scheduler") and dense_steps:
            raise ValueError(
                f"dense_steps={dense_steps} is a share of a run, and a transformer alone does not know the run. "
                "Enable draft attention on the pipeline, or use dense_timestep."
            )

    def is_dense(self, timestep: Tensor) -> bool:
        """Says whether the coming forward is dense.

        Args:
            timestep: the forward's argument, any shape, in the scheduler's units. It is read, which waits for the
                GPU, where no scheduler knows the step: before a run's first step unless the pipeline has told the
                scheduler where the run begins, and for schedulers that count no steps.
        """
        scheduler = self._scheduler()
        if scheduler is None:
            self.now = None
            return self._is_dense_alone(timestep)
        never = self._dense_steps == 0 or (self._dense_steps is None and self._dense_timestep == math.inf)
        is_new = scheduler.timesteps is not self._timesteps
        if is_new:
            self._timesteps, self._values = scheduler.timesteps, scheduler.timesteps.tolist()
            self._runs += 1
        step = self._step(scheduler, timestep)
        if is_new:
            begun = getattr(scheduler, "step_index", None) is not None
            self._dense_until = self._first_sparse_step(
                getattr(scheduler, "begin_index", None) or (0 if begun else step)
            )
        self.now = (self._runs, step)
        return not never and step < self._dense_until

    def _is_dense_alone(self, timestep: Tensor) -> bool:
        if self._dense_steps and not self._warned:
            self._warned = True
            limit = self._dense_timestep
            dense = "no step is dense" if limit == math.inf else f"steps above the timestep {limit:g} are dense"
            warnings.warn(
                f"dense_steps={self._dense_steps:g} is a share of a run, and nothing tells the step of this one: the "
                "pipeline has no scheduler with timesteps, or it is one without a step_index for a model that gets "
                f"timesteps in other units. So {dense}.",
                stacklevel=2,
            )
        if self._dense_steps == 0 or self._dense_timestep == math.inf:
            return False
        return float(timestep.max()) > self._dense_timestep

    def _step(self, scheduler: Any, timestep: Tensor) -> int:
        if not hasattr(scheduler, "step_index"):
            return self._nearest(timestep)
        if scheduler.step_index is not None:
            return scheduler.step_index
        if scheduler.begin_index is not None:
            return scheduler.begin_index
        # Video-to-video runs start in the middle, and not every pipeline tells the scheduler so.
        return self._nearest(timestep) if self._scheduler_units else 0

    def _scheduler(self) -> Any | None:
        """The scheduler, if it can tell the step."""
        pipe = self._pipe()
        if pipe is not None:
            self._last_scheduler = _weakly(getattr(pipe, "scheduler", None))
        scheduler = self._last_scheduler()
        counts = self._scheduler_units or hasattr(scheduler, "step_index")
        return scheduler if counts and getattr(scheduler, "timesteps", None) is not None else None

    def _nearest(self, timestep: Tensor) -> int:
        """The step whose timestep is nearest: models may get it rounded to their dtype."""
        value = float(timestep.max())
        return min(range(len(self._values)), key=lambda step: abs(self._values[step] - value))

    def _first_sparse_step(self, first: int) -> int:
        if self._dense_steps is not None:
            return first + round(self._dense_steps * (len(self._values) - first))
        if self._values[0] < self._values[-1] and self._dense_timestep < math.inf:
            raise ValueError(
                f"dense_timestep={self._dense_timestep} means the steps above it, the first ones where timesteps "
                f"fall; in this run they rise from {self._values[0]:g} to {self._values[-1]:g}. Use dense_steps."
            )
        below = (step for step, value in enumerate(self._values) if value <= self._dense_timestep)
        return next(below, len(self._values))


def _weakly(thing: Any) -> Callable[[], Any]:
    return (lambda: None) if thing is None else weakref.ref(thing)
