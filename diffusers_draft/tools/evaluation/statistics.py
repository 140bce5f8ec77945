"""Means over prompts with bootstrap intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
"""Number of bootstrap samples."""


@dataclass(frozen=True)
class Estimate:
    """A mean and its interval.

    Attributes:
        mean: mean of the values.
        low: lower end of the 95 % interval; None for a single value.
        high: upper end of the 95 % interval; None for a single value.
    """

    mean: float
    low: float | None
    high: float | None


def estimate(values: Sequence[float]) -> Estimate:
    """Compute the mean of one value per prompt with its 95 % percentile bootstrap interval, from a fixed seed."""
    array = np.asarray(values, dtype=float)
    mean = float(array.mean())
    if len(array) < 2:
        return Estimate(mean, None, None)
    samples = np.random.default_rng(0).integers(len(array), size=(RESAMPLES, len(array)))
    low, high = np.quantile(array[samples].mean(1), (0.025, 0.975))
    return Estimate(mean, float(low), float(high))
