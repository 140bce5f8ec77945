"""How the error of an attention output answers to density: a curve fitted to what a run has measured."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

NOISE = 0.3
"""How far a step's error usually lies from the curve, as a logarithm: the weight of the curve before a measurement."""
VANISHING = 0.25
"""Power of the share that is not computed with which an error goes to 0."""


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
    """`error = (1 - density)**VANISHING * exp(level - slope sqrt(density) + drift left)`: nothing at density 1.

    Of the forms with three numbers the one nearest to what the demo's model measured (`docs/results/error_study.py`).

    Attributes:
        level: logarithm of the error where nothing is computed and nothing of the run is left.
        slope: how fast it falls with the root of density, beside the share that is not computed. Not negative.
        drift: how it goes over the run at the same density.
        spread: of each of them before anything is measured, as standard deviations.
    """

    level: float
    slope: float
    drift: float
    spread: tuple[float, float, float]

    def error(self, density: float, left: float) -> float:
        """Compute the error to expect of a step."""
        rising = math.exp(self.level - self.slope * math.sqrt(density) + self.drift * left)
        return (1 - density) ** VANISHING * rising

    def fitted(self, points: Sequence[Point]) -> "ErrorCurve":
        """Fit the curve to measured steps: least squares of logarithms, drawn to this curve by its spread.

        Steps in which nothing was skipped tell nothing and are left out.
        """
        points = [point for point in points if point.density < 1 and point.error > 0]
        if not points:
            return self
        rows = _vector([[1.0, -math.sqrt(point.density), point.left] for point in points])
        known = _vector([math.log(point.error / (1 - point.density) ** VANISHING) for point in points])
        before = _vector([self.level, self.slope, self.drift])
        weights = (NOISE / _vector(self.spread)) ** 2
        change = torch.linalg.solve(rows.mT @ rows + weights.diag(), rows.mT @ (known - rows @ before))
        level, slope, drift = (before + change).tolist()
        return ErrorCurve(level, max(slope, 0.0), drift, self.spread)


def _vector(values: Sequence[float] | list[list[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")
