"""The study of `max_error` with the demo's model: the error reached for the one asked for, and what it costs.

Run `python docs/results/error_study.py --output FILE` in a checkout on a GPU. Every caption is made dense, with each
error asked for by a handle of its own, and with the sparsity that came of it and no feedback, all from the same noise.
One caption at a time: errors of a batch are one.
"""

import argparse
import json
import math
import multiprocessing
import time
from pathlib import Path
from typing import Any

import torch
from fidelity_study import GRIDS, Unit, clips_of, tools

from diffusers_draft import enable_draft_attention
from diffusers_draft.tools.bench.measure import environment
from diffusers_draft.tools.demo.model import WEIGHTS
from diffusers_draft.tools.evaluation.metrics import fidelity
from diffusers_draft.tools.evaluation.study import work

TARGETS = (0.03, 0.05, 0.1, 0.2)


def units(captions: list[str]) -> list[Unit]:
    """List the work so that a study that is cut short is one of fewer captions."""
    found = []
    for number, caption in enumerate(captions):
        kinds = [(grid, 14) for grid in GRIDS] + [("wide", steps) for steps in (4, 30) if number % 4 == 0]
        found += [Unit(grid, steps, (caption,), (), False) for grid, steps in kinds]
    return found


def run_unit(unit: Unit) -> list[dict[str, Any]]:
    """Make all clips of a caption and compare them with the dense one."""
    pipe, metrics = tools()
    (dense,), records = clips_of(pipe, unit), []
    for target in TARGETS:
        with enable_draft_attention(pipe, max_error=target) as handle:
            (clip,), report = clips_of(pipe, unit), handle.report()
            settled = handle.settled_sparsity()
        with enable_draft_attention(pipe, sparsity=settled) as fixed:
            (other,), fixed_report = clips_of(pipe, unit), fixed.report()
        (run,) = (transformer.run for transformer in report.transformers)
        error = report.transformers[0].error
        assert error is not None, "there are probes"
        records.append(
            {"grid": unit.grid, "steps": unit.steps, "prompt": unit.captions[0], "target": target}
            | {"reached": round(error.after, 5)}
            | {"settled": round(settled, 4), "densities": [round(forward.density, 4) for forward in run]}
            | {"errors": [round(forward.error.after, 5) for forward in run if forward.error]}
            | {"computed": round(work(None, report)["computed"], 5)}
            | {"fixed_computed": round(work(None, fixed_report)["computed"], 5)}
            | {"psnr": round(fidelity(clip, dense, metrics)["psnr"], 3)}
            | {"fixed_psnr": round(fidelity(other, dense, metrics)["psnr"], 3)}
        )
    return records


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON lines, the first with the environment")
    parser.add_argument("--captions", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no caption after this time")
    parser.add_argument("--processes", type=int, default=6, help="that share the GPU")
    args = parser.parse_args()
    todo = units((WEIGHTS / "prompts.txt").read_text().splitlines()[: args.captions])
    begin = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with args.output.open("a") as file, context.Pool(args.processes) as pool:
        file.write(json.dumps(environment(torch.device("cuda"))) + "\n")
        for number, records in enumerate(pool.imap(run_unit, todo)):
            file.writelines(json.dumps(record) + "\n" for record in records)
            file.flush()
            print(f"{number + 1} of {len(todo)}, {time.perf_counter() - begin:.0f} s", flush=True)
            if time.perf_counter() - begin > 60 * args.minutes:
                pool.terminate()
                break


if __name__ == "__main__":
    main()
