"""The study of how errors answer to density, with the demo's model: every call measured at several densities.

Run `python docs/results/error_curve.py --output FILE` in a checkout on a GPU; docs/trials.md has what came of it.
The clips themselves go on with the densities that are the default.
"""

from typing import Any

import torch
from fidelity_study import GRIDS, Unit, clips_of, tools
from over_captions import study
from torch import Tensor

from diffusers_draft import enable_draft_attention
from diffusers_draft.attention.ops import Attended, attend
from diffusers_draft.patching.forward import AttentionCall

DENSITIES = (0.03, 0.06, 0.12, 0.25, 0.5, 0.75)
STEPS = 14


def run_unit(unit: Unit) -> list[dict[str, Any]]:
    """Make a caption's clip; return the mean error of layers and forwards, for each step one at each density."""
    pipe, _ = tools()
    calls: list[Tensor] = []

    def look(seen: AttentionCall) -> Attended:
        numbers = [seen.numbers.new_tensor([1 - density, float(seen.numbers[1])]) for density in DENSITIES]
        found = [attend(*seen._replace(numbers=one).arguments).squares for one in numbers]
        calls.append(torch.stack(found))
        return attend(*seen.arguments)

    with enable_draft_attention(pipe) as handle, handle._watched(look):
        clips_of(pipe, unit)
    _, after, whole = torch.stack(calls).unbind(-1)
    errors = (after / whole).sqrt().unflatten(0, (STEPS, -1)).mean(1)
    return [{"grid": unit.grid, "errors": [[round(error, 5) for error in step] for step in errors.tolist()]}]


if __name__ == "__main__":
    study(
        __doc__,
        captions=18,
        units=lambda captions, _: [Unit(grid, STEPS, (caption,)) for grid in GRIDS for caption in captions],
        run_unit=run_unit,
        packed=lambda clips: {"densities": DENSITIES, "clips": clips},
    )
