"""The study of how closely a run must keep to the falling shape, with the demo's model.

Run `python docs/results/shape_deviations.py --output FILE` in a checkout on a GPU; docs/trials.md has what came of it.
Some steps get other densities, and all others make up for it, so that the mean stays.
"""

import functools
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fidelity_study import GRIDS, Unit, batches, clips_of, tools
from over_captions import study

from diffusers_draft import enable_draft_attention, schedules
from diffusers_draft.tools.evaluation.metrics import fidelity

MEANS = (0.1, 0.2)
CHANGES = {
    **{f"first x {factor}": (slice(1), factor) for factor in (0.5, 0.7, 1.4, 2)},
    "first dense": (slice(1), math.inf),
    **{f"first 2 x {factor}": (slice(2), factor) for factor in (0.5, 0.7, 1.4, 2)},
    **{f"first 4 x {factor}": (slice(4), factor) for factor in (0.7, 1.4)},
    **{f"second half x {factor}": (slice(7, None), factor) for factor in (0.7, 1.4)},
}
"""Some of the 14 steps, and the factor of their densities."""
WOBBLES = {"random, 0.2": (0.2, 1), "random, 0.4": (0.4, 3)}
"""Standard deviation of the logarithm of every step's density, and the seed."""


def changed(part: slice, factor: float, mean: float, left: Sequence[float]) -> list[float]:
    """Change a part of a falling schedule, and scale the other steps so that its mean holds."""
    densities = schedules.falling(mean, left)
    fixed = {step: min(1.0, factor * densities[step]) for step in range(len(left))[part]}
    rest = [density for step, density in enumerate(densities) if step not in fixed]
    others = iter(scaled(rest, mean * len(left) - sum(fixed.values())))
    return [fixed[step] if step in fixed else next(others) for step in range(len(left))]


def wobbling(deviation: float, seed: int, mean: float, left: Sequence[float]) -> list[float]:
    """Change every density of a falling schedule at random, and scale all so that their mean holds."""
    generator = random.Random(seed)
    densities = [one * math.exp(generator.gauss(0, deviation)) for one in schedules.falling(mean, left)]
    return scaled(densities, mean * len(left))


def scaled(densities: list[float], goal: float) -> list[float]:
    """Scale densities, each at most 1, to a sum."""
    factor = 1.0
    for _ in range(30):
        factor *= max(goal, 0.05) / sum(min(1.0, factor * one) for one in densities)
    return [min(1.0, factor * one) for one in densities]


SHAPES: dict[str, schedules.Schedule] = {
    "falling": schedules.falling,
    **{name: functools.partial(changed, *change) for name, change in CHANGES.items()},
    **{name: functools.partial(wobbling, *numbers) for name, numbers in WOBBLES.items()},
}


def run_unit(work: tuple[Unit, float]) -> list[dict[str, Any]]:
    """Make the clips of some captions with every shape and compare them with the dense ones."""
    unit, mean = work
    pipe, metrics = tools()
    whole, records = clips_of(pipe, unit), []
    falling = schedules.SCHEDULES["falling"]
    for name, shape in SHAPES.items():
        schedules.SCHEDULES["falling"] = shape
        try:
            with enable_draft_attention(pipe, sparsity=1 - mean):
                clips = clips_of(pipe, unit)
        finally:
            schedules.SCHEDULES["falling"] = falling
        found = [round(fidelity(clip, one, metrics)["psnr"], 3) for clip, one in zip(clips, whole, strict=True)]
        records.append({"grid": unit.grid, "mean": mean, "shape": name, "psnr": found})
    return records


def units(captions: list[str], _: Path) -> list[tuple[Unit, float]]:
    """List the work, several captions in one batch."""
    return [(Unit(grid, 14, batch), mean) for batch in batches(captions) for grid in GRIDS for mean in MEANS]


if __name__ == "__main__":
    study(
        __doc__,
        captions=24,
        units=units,
        run_unit=run_unit,
        packed=lambda records: {"settings": records},
    )
