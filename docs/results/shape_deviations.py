"""The study of how closely a run must keep to the falling shape, with the demo's model.

Run `python docs/results/shape_deviations.py --output FILE` in a checkout on a GPU; docs/trials.md has what came of it.
Some steps get other densities, and all others make up for it, so that the mean stays.
"""

import argparse
import functools
import json
import math
import multiprocessing
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from fidelity_study import BATCH, GRIDS, Unit, clips_of, tools

from diffusers_draft import enable_draft_attention, schedules
from diffusers_draft.tools.bench.measure import environment
from diffusers_draft.tools.demo.model import WEIGHTS
from diffusers_draft.tools.evaluation.metrics import fidelity

MEANS = (0.1, 0.2)
Factors = Callable[[int], list[float | None]]
"""Makes the factor of each of so many steps; None for those that make up for the others."""


def first(steps: int, factor: float) -> Factors:
    """Change the first steps."""
    return lambda count: [factor if step < steps else None for step in range(count)]


def late(factor: float) -> Factors:
    """Change the second half."""
    return lambda count: [None if step < count // 2 else factor for step in range(count)]


def dense(steps: int) -> Factors:
    """Make the first steps dense."""
    return first(steps, math.inf)


FACTORS: dict[str, Factors] = {
    "falling": lambda count: [None] * count,
    **{f"first x {factor}": first(1, factor) for factor in (0.5, 0.7, 1.4, 2)},
    "first dense": dense(1),
    **{f"first 2 x {factor}": first(2, factor) for factor in (0.5, 0.7, 1.4, 2)},
    **{f"first 4 x {factor}": first(4, factor) for factor in (0.7, 1.4)},
    **{f"second half x {factor}": late(factor) for factor in (0.7, 1.4)},
}
WOBBLES = {"random, 0.2": (0.2, 1), "random, 0.4": (0.4, 3)}
"""Standard deviation of the logarithm of every step's density, and the seed."""


def changed(factors: Factors, mean: float, left: Sequence[float]) -> list[float]:
    """Change a falling schedule, and scale the steps without a factor so that its mean holds."""
    densities = schedules.falling(mean, left)
    chosen = factors(len(left))
    fixed = [None if by is None else min(1.0, by * one) for by, one in zip(chosen, densities, strict=True)]
    rest = [one for one, known in zip(densities, fixed, strict=True) if known is None]
    goal = mean * len(left) - sum(one for one in fixed if one is not None)
    others = iter(scaled(rest, goal))
    return [next(others) if one is None else one for one in fixed]


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
    **{name: functools.partial(changed, factors) for name, factors in FACTORS.items()},
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


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="a JSON file")
    parser.add_argument("--captions", type=int, default=24)
    parser.add_argument("--processes", type=int, default=6, help="that share the GPU")
    args = parser.parse_args()
    captions = (WEIGHTS / "prompts.txt").read_text().splitlines()[: args.captions]
    batches = [tuple(captions[start : start + BATCH]) for start in range(0, len(captions), BATCH)]
    todo = [(Unit(grid, 14, batch, (), False), mean) for batch in batches for grid in GRIDS for mean in MEANS]
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        records = [record for found in pool.map(run_unit, todo, chunksize=1) for record in found]
    facts = {"environment": environment(torch.device("cuda")), "captions": captions, "settings": records}
    args.output.write_text(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main()
