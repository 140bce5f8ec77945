"""The study of layers apart with the demo's model: a step's pairs shared among its layers by their measured errors.

Run `python docs/results/layers_apart.py --output FILE` in a checkout on a GPU; docs/trials.md has what came of it.
"""

from collections.abc import Callable
from typing import Any

from fidelity_study import GRIDS, Unit, clips_of, tools
from over_captions import study

from diffusers_draft import enable_draft_attention
from diffusers_draft.attention.ops import Attended, attend
from diffusers_draft.patching.forward import AttentionCall
from diffusers_draft.tools.evaluation.metrics import fidelity
from diffusers_draft.tools.evaluation.study import work

POWERS = (0.0, 0.5, 1.0, -0.5)
"""The density of a layer goes with this power of its error; 0: all layers alike."""


def sharing(power: float) -> Callable[[AttentionCall], Attended]:
    """Make a hook that gives every layer its part of the step's density, by the errors of the step before."""
    errors: dict[str, float] = {}

    def look(seen: AttentionCall) -> Attended:
        sparsity, number = seen.numbers.tolist()
        if power and seen.path in errors:
            weights = {path: error**power for path, error in errors.items()}
            part = weights[seen.path] * len(weights) / sum(weights.values())
            sparsity = max(0.0, 1 - (1 - sparsity) * part)
        shared = seen.numbers.new_tensor([sparsity, number])
        result = attend(*seen._replace(numbers=shared).arguments)
        _, after, whole = result.squares.tolist()
        if whole and after:
            errors[seen.path] = (after / whole) ** 0.5
        return result

    return look


def run_unit(unit: Unit) -> list[dict[str, Any]]:
    """Make a caption's clip with every power and compare it with the dense one."""
    pipe, metrics = tools()
    (dense,), records = clips_of(pipe, unit), []
    for power in POWERS:
        with enable_draft_attention(pipe) as handle, handle._watched(sharing(power)):
            (clip,), report = clips_of(pipe, unit), handle.report()
        records.append(
            {"grid": unit.grid, "prompt": unit.captions[0], "power": power}
            | {"computed": round(work(None, report)["computed"], 5)}
            | {"psnr": round(fidelity(clip, dense, metrics)["psnr"], 3)}
        )
    return records


def packed(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Put the clips of each grid and power together: share of the pairs and PSNR of one caption after the other."""
    found = []
    for grid in GRIDS:
        for power in POWERS:
            clips = [[one["computed"], one["psnr"]] for one in records if (one["grid"], one["power"]) == (grid, power)]
            found.append({"grid": grid, "power": power, "clips": clips})
    return {"settings": found}


if __name__ == "__main__":
    study(
        __doc__,
        captions=32,
        units=lambda captions, _: [Unit(grid, 14, (caption,)) for caption in captions for grid in GRIDS],
        run_unit=run_unit,
        packed=packed,
    )
