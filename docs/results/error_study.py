"""The study of `max_error` with the demo's model: the error reached for the one asked for, and what it costs.

Run `python docs/results/error_study.py --output FILE` in a checkout. Every caption is made dense, with each error
asked for by a handle of its own, and with the sparsity that came of it and no feedback, all from the same noise. One
caption at a time: errors of a batch are one.
"""

import argparse
import json
import math
import multiprocessing
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline
from fidelity_study import FRAMES, GRIDS, GUIDANCE

from diffusers_draft import enable_draft_attention
from diffusers_draft.tools.bench.measure import environment
from diffusers_draft.tools.demo.model import WEIGHTS
from diffusers_draft.tools.evaluation.metrics import fidelity, fidelity_metrics
from diffusers_draft.tools.evaluation.study import work
from diffusers_draft.tools.generation.loading import from_pretrained

TARGETS = (0.03, 0.05, 0.1, 0.2)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Case = tuple[str, int, str]
"""Grid, number of steps and caption."""


def cases(captions: list[str]) -> list[Case]:
    """List the work so that a study that is cut short is one of fewer captions."""
    found: list[Case] = []
    for number, caption in enumerate(captions):
        found += [(grid, 14, caption) for grid in GRIDS]
        found += [("wide", steps, caption) for steps in (4, 30) if number % 4 == 0]
    return found


def run_case(case: Case) -> list[dict[str, Any]]:
    """Make all clips of a caption and compare them with the dense one."""
    grid, steps, caption = case
    pipe, metrics = _tools()
    dense, records = _clip(pipe, case), []
    for target in TARGETS:
        with enable_draft_attention(pipe, max_error=target) as handle:
            clip, report = _clip(pipe, case), handle.report()
            settled = handle.settled_sparsity()
        with enable_draft_attention(pipe, sparsity=settled) as fixed:
            other, fixed_report = _clip(pipe, case), fixed.report()
        (run,) = (transformer.run for transformer in report.transformers)
        error = report.transformers[0].error
        assert error is not None, "there are probes"
        records.append(
            {"grid": grid, "steps": steps, "prompt": caption, "target": target, "reached": round(error.after, 5)}
            | {"settled": round(settled, 4), "densities": [round(forward.density, 4) for forward in run]}
            | {"computed": round(work(None, report)["computed"], 5)}
            | {"fixed_computed": round(work(None, fixed_report)["computed"], 5)}
            | {"psnr": round(fidelity(clip, dense, metrics)["psnr"], 3)}
            | {"fixed_psnr": round(fidelity(other, dense, metrics)["psnr"], 3)}
        )
    return records


_kept: list[Any] = []


def _tools() -> list[Any]:
    """Load the pipeline and the metrics once in every process."""
    if not _kept:
        torch.set_num_threads(1 if DEVICE.type == "cuda" else torch.get_num_threads())
        dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
        pipe = from_pretrained(WanPipeline, str(WEIGHTS), dtype).to(DEVICE)
        pipe.set_progress_bar_config(disable=True)
        _kept.extend((pipe, fidelity_metrics().to(DEVICE)))
    return _kept


def _clip(pipe: Any, case: Case) -> np.ndarray:
    grid, steps, caption = case
    height, width = GRIDS[grid]
    options: dict[str, Any] = dict(height=height, width=width, num_frames=FRAMES, num_inference_steps=steps)
    generator = torch.Generator().manual_seed(0)
    video = pipe(caption, generator=generator, guidance_scale=GUIDANCE, output_type="np", **options).frames[0]
    return (video * 255).round().astype(np.uint8)


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON lines, the first with the environment")
    parser.add_argument("--captions", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no caption after this time")
    parser.add_argument("--processes", type=int, default=6, help="that share the device")
    args = parser.parse_args()
    todo = cases((WEIGHTS / "prompts.txt").read_text().splitlines()[: args.captions])
    begin = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with args.output.open("a") as file, context.Pool(args.processes) as pool:
        file.write(json.dumps(environment(DEVICE)) + "\n")
        for number, records in enumerate(pool.imap(run_case, todo)):
            file.writelines(json.dumps(record) + "\n" for record in records)
            file.flush()
            print(f"{number + 1} of {len(todo)}, {time.perf_counter() - begin:.0f} s", flush=True)
            if time.perf_counter() - begin > 60 * args.minutes:
                pool.terminate()
                break


if __name__ == "__main__":
    main()
