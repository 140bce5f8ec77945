"""Is this step dense? The answer comes from the pipeline's scheduler, without waiting for the GPU."""

import weakref
from typing import Any

from torch import Tensor


class Schedule:
    """The first steps of a run, where the video takes shape, stay dense.

    All transformers of a pipeline share one schedule, as they share one scheduler.

    Attributes:
        now: run and step of the latest forward; None where no scheduler tells them.
    """

    def __init__(
        self, pipe: Any, dense_steps: float | None, dense_timestep: float, *, scheduler_units: bool = True
    ) -> None:
        self._pipe = weakref.ref(pipe) if hasattr(pipe, "scheduler") else None
        self._dense_steps = dense_steps
        self._dense_timestep = dense_timestep
        self._scheduler_units = scheduler_units
        self._timesteps: Tensor | None = None
        self._values: list[float] = []
        self._dense_until = 0
        self._runs = 0
        self.now: tuple[int, int] | None = None
        if self._pipe is None and dense_steps:
            raise ValueError(
                f"dense_steps={dense_steps} is a share of a run, and a transformer alone does not know the run. "
                "Enable draft attention on the pipeline, or use dense_timestep."
            )

    def is_dense(self, timestep: Tensor) -> bool:
        """Says whether the coming forward is dense.

        Args:
            timestep: the forward's argument, any shape, in the scheduler's units. It is read, which waits for the
                GPU, where no scheduler knows the step: before a run's first step unless the pipeline has told the
                scheduler where the run begins, and for schedulers without a `step_index`.
        """
        scheduler = self._scheduler()
        never = self._dense_steps == 0 or (self._dense_steps is None and self._dense_timestep == float("inf"))
        if scheduler is None:
            self.now = None
            return not never and float(timestep.max()) > self._dense_timestep
        is_new = scheduler.timesteps is not self._timesteps
        if is_new:
            self._timesteps, self._values = scheduler.timesteps, scheduler.timesteps.tolist()
            self._runs += 1
        step = self._step(scheduler, timestep, never)
        if is_new:
            begun = getattr(scheduler, "step_index", None) is not None
            self._dense_until = self._first_sparse_step(
                getattr(scheduler, "begin_index", None) or (0 if begun else step)
            )
        self.now = (self._runs, step)
        return not never and step < self._dense_until

    def _step(self, scheduler: Any, timestep: Tensor, never: bool) -> int:
        if not hasattr(scheduler, "step_index"):
            return self._nearest(timestep)
        if scheduler.step_index is not None:
            return scheduler.step_index
        if scheduler.begin_index is not None:
            return scheduler.begin_index
        # Video-to-video runs start in the middle, and not every pipeline tells the scheduler so.
        return 0 if never or not self._scheduler_units else self._nearest(timestep)

    def _scheduler(self) -> Any | None:
        pipe = None if self._pipe is None else self._pipe()
        return None if pipe is None else pipe.scheduler

    def _nearest(self, timestep: Tensor) -> int:
        """The step whose timestep is nearest: models may get it rounded to their dtype."""
        value = float(timestep.max())
        return min(range(len(self._values)), key=lambda step: abs(self._values[step] - value))

    def _first_sparse_step(self, first: int) -> int:
        if self._dense_steps is not None:
            return first + round(self._dense_steps * (len(self._values) - first))
        if self._values[0] < self._values[-1] and self._dense_timestep < float("inf"):
            raise ValueError(
                f"dense_timestep={self._dense_timestep} means the steps above it, the first ones where timesteps "
                f"fall; in this run they rise from {self._values[0]:g} to {self._values[-1]:g}. Use dense_steps."
            )
        below = (step for step, value in enumerate(self._values) if value <= self._dense_timestep)
        return next(below, len(self._values))
