"""Means over prompts with bootstrap intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A mean and its interval.

    Attributes:
        mean: of the values.
        low: lower end of the 95 % interval; None for a single value, which has none.
        high: upper end.
    """

    mean: float
    low: float | None
    high: float | None


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of one value per prompt with its 95 % percentile bootstrap interval; the same every time."""
    array = np.asarray(values, dtype=float)
    mean = float(array.mean())
    if len(array) < 2:
        return Estimate(mean, None, None)
    samples = np.random.default_rng(0).integers(len(array), size=(RESAMPLES, len(array)))
    low, high = np.quantile(array[samples].mean(1), (0.025, 0.975))
    return Estimate(mean, float(low), float(high))
