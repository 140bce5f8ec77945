"""Draws a value over the steps of a run as a line of bars."""

import math
from collections.abc import Iterable
from itertools import groupby
from operator import itemgetter
from statistics import fmean

BARS = " ▁▂▃▄▅▆▇█"
"""Heights of the bars; the first is nothing."""
WIDTH = 64
"""Bars at most: those of longer runs are means of several steps."""


def chart(values: Iterable[tuple[int, float]]) -> str:
    """Draw a value over the steps of a run as a line of bars, each relative to the largest.

    Args:
        values: a step and its value, in turn; those of a step are one bar, their mean.

    Returns:
        The bars, with "?" where the value is not finite; nothing if the value stays the same.
    """
    steps = [fmean(value for _, value in group) for _, group in groupby(values, key=itemgetter(0))]
    width = -(-len(steps) // WIDTH) or 1
    means = [fmean(steps[first : first + width]) for first in range(0, len(steps), width)]
    highest = max(filter(math.isfinite, means), default=0.0)
    if len(set(means)) < 2 or not highest:
        return ""
    heights = [math.ceil(mean / highest * (len(BARS) - 1)) if math.isfinite(mean) else None for mean in means]
    return "".join("?" if height is None else BARS[height] for height in heights)
