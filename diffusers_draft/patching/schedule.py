"""How dense is this step?"""

import math
import warnings
from typing import Any, NamedTuple

from torch import Tensor

from ..config import DraftConfig
from ..families.family import Family
from ..schedules import SCHEDULES, constant
from ..schedules import Schedule as Shape
from .clock import Moment
from .feedback import AskedStep, Feedback

ALONE = 100
"""Steps that a run is thought to have where nobody knows it, evenly spread over the noise."""
LEAST = 1e-3
"""The least density where the size of the video is not known."""


class SparseStep(NamedTuple):
    """What a sparse forward is to do.

    Attributes:
        sparsity: share of the pairs of video blocks to skip.
        number: of the step, the same whenever the run is repeated.
        asked: where the density follows errors, what waits for those of this step.
    """

    sparsity: float
    number: int
    asked: AskedStep | None = None


def share_left(moment: Moment) -> list[float]:
    """Compute the share of a run that is left when each of its steps begins, from 1 at the first."""
    steps = len(moment.timesteps) - moment.begin
    return [1 - index / steps for index in range(steps)]


class Schedule:
    """Tells the sparsity of a forward from its moment in the run.

    Args:
        shape: how the density goes over the sparse steps.
        goal: the mean sparsity of the sparse steps, or what sets the density by its error.
        dense_steps: share of the run's steps, from its start, that are dense; None leaves it to the timestep.
        dense_timestep: steps whose timestep is above this are dense.
        top_timestep: the timestep of pure noise, for forwards without a moment; None where timesteps do not tell.
    """

    def __init__(
        self,
        shape: Shape,
        goal: float | Feedback,
        dense_steps: float | None,
        dense_timestep: float,
        top_timestep: float | None,
    ) -> None:
        self._shape = shape
        self._goal = goal
        self._dense_steps = dense_steps
        self._dense_timestep = dense_timestep
        self._top_timestep = top_timestep
        self._warned = False

    def at(self, moment: Moment | None, timestep: Tensor, least: float = LEAST) -> SparseStep | None:
        """Tell what a forward is to do; None if it is dense.

        Args:
            moment: of the forward; None where nothing but the timestep tells it.
            timestep: the forward's argument, any shape. Without a moment it is read, which waits for the GPU, if the
                density depends on it; on the meta device, which has no values, the forward is dense then.
            least: the density of one block a row.

        Raises:
            ValueError: if a timestep is to tell and timesteps rise.
        """
        return self._alone(timestep, least) if moment is None else self._in_run(moment, least)

    def _in_run(self, moment: Moment, least: float) -> SparseStep | None:
        last = len(moment.timesteps) - 1
        first = moment.joined if self._never_dense else max(moment.joined, self._first_sparse_step(moment))
        step = min(moment.step, last)
        if step < first:
            return None
        left = share_left(moment)[first - moment.begin :]
        return self._step(moment.run, left, step - first, least, number=step)

    def _alone(self, timestep: Tensor, least: float) -> SparseStep | None:
        self._warn_of_unknown_run()
        limit = self._limit_alone
        top = None if self._shape is constant else self._top_timestep
        tells = top is not None or limit < math.inf
        if tells and timestep.device.type == "meta":  # it has no value, and shapes are the same
            return None
        value = float(timestep.max()) if tells else 0.0
        if value > limit:
            return None
        if top is None:
            return self._step(None, [1.0], 0, least, number=0)
        left = [share / ALONE for share in range(ALONE, -1, -1) if share / ALONE * top <= limit]
        if not left:
            return None
        index = min(range(len(left)), key=lambda index: abs(left[index] - value / top))
        return self._step(None, left, index, least, number=index)

    @property
    def _limit_alone(self) -> float:
        """The timestep above which a forward without a moment is dense: a share of the run is one of the noise."""
        if self._dense_steps == 0:
            return math.inf
        if self._dense_steps is None or self._top_timestep is None:
            return self._dense_timestep
        return (1 - self._dense_steps) * self._top_timestep

    def _step(self, run: Tensor | None, left: list[float], index: int, least: float, number: int) -> SparseStep:
        if isinstance(self._goal, Feedback):
            asked = self._goal.step(run, left, index, least)
            return SparseStep(1 - asked.density, number, asked)
        if self._shape is constant:
            return SparseStep(self._goal, number)
        return SparseStep(max(0.0, 1 - self._shape(1 - self._goal, left)[index]), number)

    @property
    def _never_dense(self) -> bool:
        return self._dense_steps == 0 or (self._dense_steps is None and self._dense_timestep == math.inf)

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

    def _warn_of_unknown_run(self) -> None:
        if not self._dense_steps or self._warned:
            return
        self._warned = True
        limit = self._limit_alone
        dense = "no step is dense" if limit == math.inf else f"steps above the timestep {limit:g} are dense"
        warnings.warn(
            f"dense_steps={self._dense_steps:g} is a share of a run, and nothing tells the step of this one: no "
            "pipeline runs the transformer and its scheduler is not at this timestep of a run, or the pipeline has no "
            "scheduler with timesteps, or it is one without a step_index for a model that gets timesteps in other "
            f"units. So {dense}.",
            stacklevel=2,
        )


def schedule_for(pipe: Any, family: Family, config: DraftConfig) -> Schedule:
    """Make the schedule that was asked for.

    Raises:
        ValueError: for a share of a run that a transformer alone does not know.
    """
    knows_run = hasattr(pipe, "scheduler")
    share, limit = config.dense_steps, config.dense_timestep
    if config.schedule == "paper":
        if share is None and limit is None and knows_run:
            share = family.dense_steps
        limit = family.dense_timestep if limit is None else limit
    if share and not knows_run:
        raise ValueError(
            f"dense_steps={share} is a share of a run, and a transformer alone does not know the run. "
            "Enable draft attention on the pipeline, or use dense_timestep."
        )
    limit = math.inf if limit is None else limit
    shape = SCHEDULES[config.schedule]
    goal = config.known_sparsity if config.max_error is None else Feedback(config.max_error, shape)
    return Schedule(shape, goal, share, limit, family.top_timestep)
