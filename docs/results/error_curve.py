"""The study of how errors answer to density, with the demo's model: every call measured at several densities.

Run `python docs/results/error_curve.py --output FILE` in a checkout on a GPU; docs/trials.md has what came of it.
The clips themselves go on with the densities that are the default.
"""

import argparse
import json
import multiprocessing
from pathlib import Path

import torch
from fidelity_study import GRIDS, Unit, clips_of, tools
from torch import Tensor

from diffusers_draft import enable_draft_attention
from diffusers_draft.attention.ops import Attended, attend
from diffusers_draft.patching.forward import AttentionCall
from diffusers_draft.tools.bench.measure import environment
from diffusers_draft.tools.demo.model import WEIGHTS

DENSITIES = (0.03, 0.06, 0.12, 0.25, 0.5, 0.75)
STEPS = 14


def run_unit(unit: Unit) -> list[list[float]]:
    """Make a caption's clip; return the mean error of layers and forwards, for each step one at each density."""
    pipe, _ = tools()
    calls: list[Tensor] = []

    def look(seen: AttentionCall) -> Attended:
        query, key, value, geometry, kv_len, numbers, method, scale = seen.arguments
        number = float(numbers[1])
        at = [numbers.new_tensor([1 - density, number]) for density in DENSITIES]
        squares = [attend(query, key, value, geometry, kv_len, one, method, scale).squares for one in at]
        calls.append(torch.stack(squares))
        return attend(*seen.arguments)

    with enable_draft_attention(pipe) as handle, handle._watched(look):
        clips_of(pipe, unit)
    _, after, whole = torch.stack(calls).unbind(-1)
    errors = (after / whole).sqrt().unflatten(0, (STEPS, -1)).mean(1)
    return [[round(error, 5) for error in step] for step in errors.tolist()]


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="a JSON file")
    parser.add_argument("--captions", type=int, default=18)
    parser.add_argument("--processes", type=int, default=6, help="that share the GPU")
    args = parser.parse_args()
    captions = (WEIGHTS / "prompts.txt").read_text().splitlines()[: args.captions]
    todo = [Unit(grid, STEPS, (caption,), (), False) for grid in GRIDS for caption in captions]
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        found = pool.map(run_unit, todo, chunksize=1)
    clips = [{"grid": unit.grid, "errors": errors} for unit, errors in zip(todo, found, strict=True)]
    facts = {"environment": environment(torch.device("cuda")), "captions": captions, "densities": DENSITIES}
    args.output.write_text(json.dumps(facts | {"clips": clips}) + "\n")


if __name__ == "__main__":
    main()
