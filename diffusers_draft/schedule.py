"""Is this step dense? The answer comes from the pipeline's scheduler, without waiting for the GPU."""

import weakref
from typing import Any

from torch import Tensor


class Schedule:
    """The first steps of a run, where the video takes shape, stay dense.

    All transformers of a pipeline share one schedule, as they share one scheduler.

    Attributes:
        dense_until: index of the first sparse step of the current run.
    """

    def __init__(self, pipe: Any, dense_steps: float | None, dense_timestep: float) -> None:
        self._pipe = weakref.ref(pipe) if hasattr(pipe, "scheduler") else None
        self._dense_steps = dense_steps
        self._dense_timestep = dense_timestep
        self._run: tuple[Tensor | None, int] = (None, 0)
        self.dense_until = 0
        if self._pipe is None and dense_steps:
            raise ValueError(
                f"dense_steps={dense_steps} is a share of a run, and a transformer alone does not know the run. "
                "Enable draft attention on the pipeline, or use dense_timestep."
            )

    @property
    def has_dense_steps(self) -> bool:
        if self._dense_steps is not None:
            return self._dense_steps > 0
        return self._dense_timestep != float("inf")

    def scheduler(self) -> Any | None:
        pipe = None if self._pipe is None else self._pipe()
        return None if pipe is None else pipe.scheduler

    def is_dense(self, timestep: Tensor) -> bool:
        """Says whether the coming forward is dense.

        Args:
            timestep: the forward's argument, any shape; read (a GPU sync) only where no scheduler knows the step.
        """
        if not self.has_dense_steps:
            return False
        scheduler = self.scheduler()
        if not hasattr(scheduler, "step_index"):
            return self._is_dense_value(timestep, scheduler)
        step = self.observe()
        return step is not None and step < self.dense_until

    def observe(self) -> int | None:
        """Reads the timesteps of a new run (the one sync of a run) and returns the current step, if one is known."""
        scheduler = self.scheduler()
        if scheduler is None:
            return None
        begin = getattr(scheduler, "begin_index", None) or 0
        if scheduler.timesteps is not self._run[0] or begin != self._run[1]:
            self._run = (scheduler.timesteps, begin)
            self.dense_until = self._first_sparse_step(scheduler.timesteps.tolist(), begin)
        step = getattr(scheduler, "step_index", None)
        return begin if step is None else step

    def _first_sparse_step(self, timesteps: list[float], begin: int) -> int:
        if self._dense_steps is not None:
            return begin + round(self._dense_steps * (len(timesteps) - begin))
        return next((i for i, t in enumerate(timesteps) if t <= self._dense_timestep), len(timesteps))

    def _is_dense_value(self, timestep: Tensor, scheduler: Any | None) -> bool:
        value = float(timestep.max())
        if self._dense_steps is None:
            return value > self._dense_timestep
        assert scheduler is not None  # checked by __init__
        self.observe()
        return sum(t > value for t in scheduler.timesteps.tolist()) < self.dense_until
