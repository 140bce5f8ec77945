"""The study of how a schedule should fall, with the demo's model: other powers and ends at the same mean density.

Run `python docs/results/falling_constants.py --output FILE` in a checkout on a GPU; docs/trials.md has what came
of it.
"""

from pathlib import Path

from fidelity_study import GRIDS, Unit, batches, draft, packed, run_unit
from over_captions import study

SPARSITIES = (0.9, 0.8, 0.65)
CONSTANTS = ((3, 0.25), (3, 0.15), (3, 0.35), (3, 0.5), (3, 0.75), (2, 0.5), (4, 0.35), (4, 0.5))
"""Power and end."""
VARIANTS = tuple(draft(sparsity, power=power, end=end) for sparsity in SPARSITIES for power, end in CONSTANTS)
KINDS = [*((grid, 14) for grid in GRIDS), *(("wide", steps) for steps in (4, 8, 30))]
"""Grids, and numbers of steps."""


def units(captions: list[str], _: Path) -> list[Unit]:
    """List the work, several captions in one batch."""
    return [Unit(grid, steps, batch, VARIANTS) for batch in batches(captions) for grid, steps in KINDS]


if __name__ == "__main__":
    study(__doc__, captions=32, units=units, run_unit=run_unit, packed=packed)
