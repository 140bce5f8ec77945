"""How the density goes over a run: one function for each schedule."""

from collections.abc import Callable, Sequence

END = 0.25
"""Density at the end of a falling schedule, relative to the mean."""
POWER = 3.0
"""How a falling schedule falls: density above the end goes with this power of the share of the run that is left."""

Schedule = Callable[[float, Sequence[float]], list[float]]
"""Makes the density of each sparse step of a run, from their mean and the share of the run that is left at each."""


def constant(mean: float, left: Sequence[float]) -> list[float]:
    """Keep the density the same."""
    return [mean] * len(left)


def falling(mean: float, left: Sequence[float]) -> list[float]:
    """Let the density fall: the first steps, where the video takes shape, skip least.

    Where the first density would pass 1 it is 1, and the end rises so that the mean holds.

    Args:
        mean: of the densities, in (0, 1].
        left: share of the run that is left when each step begins, falling, in [0, 1].

    Returns:
        One density for each step, in (0, 1].
    """
    most = max(left, default=0.0)
    if most == 0:
        return constant(mean, left)
    weights = [(share / most) ** POWER for share in left]
    average = sum(weights) / len(weights)
    end = END * mean
    start = end + (mean - end) / average
    if start > 1:
        start, end = 1.0, (mean - average) / (1 - average)
    return [end + (start - end) * weight for weight in weights]


SCHEDULES: dict[str, Schedule] = {"falling": falling, "constant": constant, "paper": constant}
"""By name; `"paper"` also has the dense steps and layers of the model family."""
