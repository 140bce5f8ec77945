"""The study of `max_error` with the demo's model: the error reached for the one asked for, and what it costs.

Run `python docs/results/error_study.py --output FILE` in a checkout on a GPU. Every caption is made dense, with each
error asked for by a handle of its own, and with the sparsity that came of it and no feedback, all from the same noise.
One caption at a time: errors of a batch are one.
"""

import math
import statistics
from pathlib import Path
from typing import Any

from fidelity_study import GRIDS, Unit, clips_of, tools
from over_captions import study

from diffusers_draft import enable_draft_attention
from diffusers_draft.tools.evaluation.metrics import fidelity
from diffusers_draft.tools.evaluation.study import work

TARGETS = (0.03, 0.05, 0.1, 0.2)
LEAST = {"wide": 1 / 81, "tall": 1 / 81, "ragged": (80 * 2 + 81) / 81**2}
"""One block of 81 for each; the ragged grid has 80 and a rest, all of whose pairs are computed."""


def units(captions: list[str], _: Path) -> list[Unit]:
    """List the work, caption by caption."""
    found = []
    for number, caption in enumerate(captions):
        kinds = [(grid, 14) for grid in GRIDS] + [("wide", steps) for steps in (4, 30) if number % 4 == 0]
        found += [Unit(grid, steps, (caption,)) for grid, steps in kinds]
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
            | {"errors": [round(forward.error.after, 5) if forward.error else 0.0 for forward in run]}
            | {"computed": round(work(None, report)["computed"], 5)}
            | {"fixed_computed": round(work(None, fixed_report)["computed"], 5)}
            | {"psnr": round(fidelity(clip, dense, metrics)["psnr"], 3)}
            | {"fixed_psnr": round(fidelity(other, dense, metrics)["psnr"], 3)}
        )
    return records


def packed(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Put the records of clips together.

    Returns:
        `settings`, each with `grid`, `steps`, `target`; `densities` and `errors` of its forwards, means of all
        captions; and `clips`: caption's number, error reached, whether the density ended at a bound, share of all
        pairs with and without feedback, and both PSNR.
    """
    captions = list(dict.fromkeys(record["prompt"] for record in records))
    settings: dict[tuple[str, int, float], dict[str, Any]] = {}
    for one in records:
        key = one["grid"], one["steps"], one["target"]
        entry = settings.setdefault(key, dict(zip(("grid", "steps", "target"), key, strict=True)) | {"clips": []})
        for name in ("densities", "errors"):
            entry.setdefault(name, []).append(one[name])
        bounded = one["densities"][-1] < LEAST[one["grid"]] + 1e-3 or one["densities"][-1] == 1
        numbers = [one[name] for name in ("computed", "fixed_computed", "psnr", "fixed_psnr")]
        entry["clips"].append([captions.index(one["prompt"]), one["reached"], bounded, *numbers])
    for entry in settings.values():
        for name in ("densities", "errors"):
            entry[name] = [round(statistics.mean(forward), 4) for forward in zip(*entry[name], strict=True)]
    return {"settings": list(settings.values())}


def table(record: dict[str, Any]) -> str:
    """Return a row in Markdown for each number of steps and target, of all grids."""
    lines = [
        "| steps | asked for | reached, mean | within 15 % of it | share of pairs | PSNR | beside that mean, fixed |",
        "|---|---|---|---|---|---|---|",
    ]
    kinds = sorted(
        {(one["steps"], one["target"]) for one in record["settings"]}, key=lambda kind: (kind[0] != 14, kind)
    )
    for steps, target in kinds:
        clips = [
            clip
            for one in record["settings"]
            if (one["steps"], one["target"]) == (steps, target)
            for clip in one["clips"]
        ]
        free = [clip for clip in clips if not clip[2]]
        gains = [clip[5] - clip[6] for clip in clips]
        interval = 1.96 * statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
        near = sum(abs(clip[1] / target - 1) <= 0.15 for clip in free)
        cells = [
            str(steps),
            f"{target:g}",
            f"{statistics.mean(clip[1] for clip in clips):.3f}",
            f"{near} of {len(free)}",
        ]
        cells.append(f"{statistics.mean(clip[3] for clip in clips):.3f}")
        cells.append(f"{statistics.mean(clip[5] for clip in clips):.1f}")
        cells.append(f"{statistics.mean(gains):+.2f} ± {interval:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(study(__doc__, captions=64, units=units, run_unit=run_unit, packed=packed)))
