"""How the density goes over a run: one function for each schedule."""

from collections.abc import Callable, Sequence

POWER = 3.0
"""How a falling schedule falls: density above the end goes with this power of the share of the run that is left."""

Schedule = Callable[[float, Sequence[float]], list[float]]
"""Makes the density of each sparse step of a run, from their mean and the share of the run that is left at each."""


def constant(mean: float, left: Sequence[float]) -> list[float]:
    """Keep the density the same."""
    return [mean] * len(left)


def end_of(steps: int) -> float:
    """Say where a falling schedule of so many steps ends, relative to its mean: the fewer they are, the less it falls.

    What the last step does wrong stays in the video, and of few steps it does much. The form is what
    `docs/results/falling_constants.py` found for 4, 8, 14 and 30 steps.
    """
    return min(1.0, 0.25 + 2 / steps)


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
    end = end_of(len(left)) * mean
    start = end + (mean - end) / average
    if start > 1:
        start, end = 1.0, (mean - average) / (1 - average)
    return [end + (start - end) * weight for weight in weights]


SCHEDULES: dict[str, Schedule] = {"falling": falling, "constant": constant, "paper": constant}
"""By name; `"paper"` also has the dense steps and layers of the model family."""
