"""The study of how a schedule should fall, with the demo's model: other powers and ends at the same mean density.

Run `python docs/results/falling_constants.py --output FILE` in a checkout on a GPU; docs/trials.md has what came
of it.
"""

import dataclasses
import functools
from collections.abc import Sequence
from unittest import mock

import shape_deviations
from fidelity_study import Unit
from over_captions import study
from shape_deviations import record, run_unit

from diffusers_draft import schedules

MEANS = (0.1, 0.2, 0.35)
CONSTANTS = ((2, 0.25), (3, 0.15), (3, 0.35), (3, 0.5), (4, 0.25), (4, 0.35), (4, 0.5))
"""Power and end."""
OTHER_STEPS = (4, 8, 30)
"""On one grid, beside the 14 on all."""


def falling(power: float, end: float, mean: float, left: Sequence[float]) -> list[float]:
    """Fall with other constants."""
    with mock.patch.multiple(schedules, POWER=power, END=end):
        return schedules.falling(mean, left)


SHAPES: dict[str, schedules.Schedule] = {
    "falling": schedules.falling,
    **{f"power {power}, end {end}": functools.partial(falling, power, end) for power, end in CONSTANTS},
}


def units(captions: list[str]) -> list[tuple[Unit, float]]:
    """List the work, several captions in one batch."""
    usual = shape_deviations.units(captions, MEANS)
    others = [
        (dataclasses.replace(unit, steps=steps), mean)
        for unit, mean in usual
        if unit.grid == "wide"
        for steps in OTHER_STEPS
    ]
    return usual + others


if __name__ == "__main__":
    study(
        __doc__,
        captions=48,
        units=units,
        run_unit=functools.partial(run_unit, shapes=SHAPES),
        record=record,
    )
