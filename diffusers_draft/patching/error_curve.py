"""How the error of an attention output answers to density: a curve fitted to what a run has measured."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

NOISE = 0.3
"""How far a step's error usually lies from the curve, as a logarithm: the weight of the curve before a measurement."""
FLOOR = 0.01
"""Added to density: errors end where hardly a pair is computed."""


class Point(NamedTuple):
    """A measured step.

    Attributes:
        density: that was computed.
        left: share of the run that was left when the step began.
        error: relative error of its outputs.
    """

    density: float
    left: float
    error: float


@dataclass(frozen=True)
class ErrorCurve:
    """`error = exp(level + drift left + start) ((1 - density) / (FLOOR + density))**slope`.

    Errors of the demo's model go so with density at every step; its captions differ by the level
    (`docs/results/error_curve.py`).

    Attributes:
        level: logarithm of the error where half is computed and nothing of the run is left.
        slope: power of the share that is skipped over the share that is computed. Not negative.
        drift: how the logarithm goes over the run at the same density.
        start: what the first step of a run has beside that, whose input is all noise.
        spread: of each of them before anything is measured, as standard deviations.
    """

    level: float
    slope: float
    drift: float
    start: float
    spread: tuple[float, float, float, float]

    def error(self, density: float, left: float) -> float:
        """Compute the error to expect of a step."""
        if density >= 1:
            return 0.0
        numbers = (self.level, self.slope, self.drift, self.start)
        return math.exp(sum(a * b for a, b in zip(numbers, _row(density, left), strict=True)))

    def fitted(self, points: Sequence[Point]) -> "ErrorCurve":
        """Fit the curve to measured steps: least squares of logarithms, drawn to this curve by its spread.

        Steps in which nothing was skipped tell nothing and are left out.
        """
        points = [point for point in points if point.density < 1 and point.error > 0]
        if not points:
            return self
        rows = _vector([_row(point.density, point.left) for point in points])
        known = _vector([math.log(point.error) for point in points])
        before = _vector([self.level, self.slope, self.drift, self.start])
        weights = (NOISE / _vector(self.spread)) ** 2
        change = torch.linalg.solve(rows.mT @ rows + weights.diag(), rows.mT @ (known - rows @ before))
        level, slope, drift, start = (before + change).tolist()
        return ErrorCurve(level, max(slope, 0.0), drift, start, self.spread)


def _row(density: float, left: float) -> list[float]:
    """List what level, slope, drift and start are multiplied with."""
    return [1.0, math.log((1 - density) / (FLOOR + density)), left, float(left == 1)]


def _vector(values: Sequence[float] | list[list[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")
