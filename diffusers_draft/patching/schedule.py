"""Is this step dense?"""

import math
import warnings
from typing import Any

from torch import Tensor

from ..config import DraftConfig
from ..families.family import Family
from .clock import Moment


class Schedule:
    """The first steps of a run, where the video takes shape, stay dense.

    Args:
        dense_steps: share of the run's steps, from its start; None leaves it to the timestep.
        dense_timestep: steps whose timestep is above this are dense.
    """

    def __init__(self, dense_steps: float | None, dense_timestep: float) -> None:
        self._dense_steps = dense_steps
        self._dense_timestep = dense_timestep
        self._warned = False

    def is_dense(self, moment: Moment | None, timestep: Tensor) -> bool:
        """Return True if a forward is dense.

        Args:
            moment: of the forward; None where nothing but the timestep tells it.
            timestep: the forward's argument, any shape. It is read, which waits for the GPU, if there is no moment.

        Raises:
            ValueError: if a timestep is to tell and timesteps rise.
        """
        if moment is None:
            return self._is_dense_alone(timestep)
        never = self._dense_steps == 0 or (self._dense_steps is None and self._dense_timestep == math.inf)
        return not never and moment.step < self._first_sparse_step(moment)

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

    def _first_sparse_step(self, moment: Moment) -> int:
        timesteps = moment.timesteps
        if self._dense_steps is not None:
            return moment.begin + round(self._dense_steps * (len(timesteps) - moment.begin))
        if timesteps[0] < timesteps[-1] and self._dense_timestep < math.inf:
            raise ValueError(
                f"dense_timestep={self._dense_timestep} means the steps above it, the first ones where timesteps "
                f"fall; in this run they rise from {timesteps[0]:g} to {timesteps[-1]:g}. Use dense_steps."
            )
        below = (step for step, value in enumerate(timesteps) if value <= self._dense_timestep)
        return next(below, len(timesteps))


def schedule_for(pipe: Any, family: Family, config: DraftConfig) -> Schedule:
    """Make the schedule that was asked for, or else the family's.

    Raises:
        ValueError: for a share of a run that a transformer alone does not know.
    """
    knows_run = hasattr(pipe, "scheduler")
    if config.dense_steps is not None or config.dense_timestep is not None:
        share, limit = config.dense_steps, config.dense_timestep
    else:
        share, limit = family.dense_steps if knows_run else None, None
    if share and not knows_run:
        raise ValueError(
            f"dense_steps={share} is a share of a run, and a transformer alone does not know the run. "
            "Enable draft attention on the pipeline, or use dense_timestep."
        )
    return Schedule(share, family.dense_timestep if limit is None else limit)
