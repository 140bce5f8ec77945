"""Print the tables of docs/benchmarks.md, of docs/speed.md or of README, from the records in this folder.

`python docs/results/tables.py [--full | --readme] [--plot FILE] [--plot-error FILE]`: the files get the pictures.
"""

import argparse
import json
import statistics
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import speed_records
from row_by_row import speed_page
from speed_records import best_dense, compiled, dtype, gpus, ms, timed

from diffusers_draft.attention.kernels import BACKENDS
from diffusers_draft.tools.bench.attention import Row
from diffusers_draft.tools.bench.measure import Time
from diffusers_draft.tools.bench.pictures import plot, plot_error
from diffusers_draft.tools.bench.run import STOCK
from diffusers_draft.tools.bench.step import NO_ATTENTION, NOT_DENSE, ONE_GPU

FIDELITY = Path(__file__).parent / "fidelity" / "defaults.json"
README_RUNS = {
    "hunyuan-13b-768p": "HunyuanVideo 13B, 768p",
    "hunyuan-13b-720p": "HunyuanVideo 13B, 720p",
    "wan-14b-768p": "Wan 2.1 14B, 768p",
    "wan-14b-480p": "Wan 2.1 14B, 480p",
}
"""Models whose runs README shows, and their names there."""
FIRST_EDITION = "sparsity=0.9,schedule=paper,score=mass,probes=0,budget=row,tile=2x8x8"
DEFAULT = "sparsity=0.8,schedule=falling,score=value,probes=64,budget=row,tile=4x4x8"
"""Settings of the study of fidelity that README compares."""
SWEEP = "hunyuan-768p"
"""The record of many sparsities, which the pictures are drawn from."""
SHOWN = (0.8, 0.9)
"""Sparsities of the table of attention calls."""


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables and draw the picture that are asked for.

    Args:
        argv: the arguments without the script's name; by default those of the process.
    """
    parser = argparse.ArgumentParser(description="Prints the recorded results as docs/benchmarks.md shows them.")
    parser.add_argument("--readme", action="store_true", help="the few rows that README shows")
    parser.add_argument("--full", action="store_true", help="every row, as docs/speed.md shows them")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the recorded sweep of sparsities to this file")
    parser.add_argument("--plot-error", type=Path, metavar="FILE", help="draw its errors over the time to this file")
    options = parser.parse_args(argv)
    print(speed_page() if options.full else readme_section() if options.readme else speed_section())
    if options.plot:
        plot_sweep(options.plot, plot)
    if options.plot_error:
        plot_sweep(options.plot_error, plot_error)


def readme_section() -> str:
    """Return README's numbers in Markdown: a row for each whole run, and what the same settings cost in fidelity."""
    runs = {record["model"]: record["runs"] for record in speed_records.load().values() if "runs" in record}
    lines = ["| Whole run, compiled, one H200 | best dense attention | draft attention | |", "|---|---|---|---|"]
    for model, name in README_RUNS.items():
        dense, draft = (_seconds(runs[model], start) for start in ("dense", "draft 0.8"))
        lines.append(f"| {name} | {dense:.0f} s | {draft:.0f} s | **{dense / draft:.2f}x** |")
    (pairs, psnr), (pairs_before, psnr_before) = (_fidelity(setting) for setting in (DEFAULT, FIRST_EDITION))
    cost = (
        f"With the demo's model (64 captions, three grids) the defaults, `sparsity=0.8`, compute {pairs:.0%} of all "
        f"pairs of blocks for a PSNR of {psnr:.1f} dB against the dense videos; those of version 0.1.0 computed "
        f"{pairs_before:.0%} for {psnr_before:.1f} dB. Against the attention that diffusers chooses the runs "
        f"are {' and '.join(_against_default(runs))}."
    )
    return "\n".join([*lines, "", *textwrap.wrap(cost, 118)])


def _against_default(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Say how much faster those runs are whose record has diffusers' default attention."""
    found = []
    for model, name in README_RUNS.items():
        if any(run["name"] == STOCK for run in runs[model]):
            found.append(f"{_seconds(runs[model], STOCK) / _seconds(runs[model], 'draft 0.8'):.1f}x as fast ({name})")
    return found


def _seconds(runs: list[dict[str, Any]], start: str) -> float:
    return next(run["seconds"] for run in runs if run["name"].startswith(start))


def _fidelity(setting: str) -> tuple[float, float]:
    """Return the share of pairs that a setting computes, and the PSNR of its videos, means of the grids."""
    settings = json.loads(FIDELITY.read_text())["settings"]
    grids = [one for one in settings if one["setting"] == setting and one["steps"] == 14]
    psnr = [statistics.mean(clip[1] for clip in one["clips"]) for one in grids]
    return statistics.mean(one["computed"] for one in grids), statistics.mean(psnr)


def speed_section() -> str:
    """Return one line for each attention shape and each model, against the best dense attention of the same run.

    In Markdown: what `docs/benchmarks.md` holds.
    """
    records = speed_records.load()
    lines = [
        "| A whole run | steps | s | against the best dense | predicted, s | memory, GiB |",
        "|---|---|---|---|---|---|",
        *(line for record in records.values() if "runs" in record for line in _runs(record)),
        "",
        "| One attention call | tokens | sparsity | best dense, ms | draft attention, ms | as in the paper, ms |",
        "|---|---|---|---|---|---|",
        *(line for record in records.values() if "rows" in record for line in _shape(record)),
        "",
        "| One forward of a model | best dense, ms | draft, ms | of it attention | 50 steps, s | memory, GiB |",
        "|---|---|---|---|---|---|",
        *(_step(record) for record in records.values() if "prediction" in record and not gpus(record)),
    ]
    if over_gpus := [_over_gpus(record) for record in records.values() if gpus(record)]:
        lines += [
            "",
            "| One forward, all sparse | one GPU, ms | several, ms | exchanges if alone | best dense on as many, ms |",
            "|---|---|---|---|---|",
            *over_gpus,
        ]
    return "\n".join(lines)


def plot_sweep(path: Path, picture: Callable[[list[Row], Path, str], None]) -> None:
    """Draw the record `SWEEP`."""
    record = speed_records.load()[SWEEP]
    rows = [Row(**{**row, "time": row["time"] and Time(**row["time"])}) for row in record["rows"]]
    picture(rows, path, f"{SWEEP}, {record['environment']['device']}, {dtype(record)}")


def _shape(record: dict[str, Any]) -> list[str]:
    """Return a row for each sparsity: the best dense time, the best backend's and that of the paper's settings."""
    dense = best_dense(record)
    shape = record["shape"]
    tokens = shape["grid"][0] * shape["grid"][1] * shape["grid"][2] + shape["text"]
    name = f"{record['name']}, {record['environment']['device']}, {dtype(record)}"
    lines = []
    for sparsity in sorted({row["sparsity"] for row in timed(record)} & set(SHOWN)):
        cells = [name, f"{shape['batch']} x {tokens:,}" if shape["batch"] > 1 else f"{tokens:,}", f"{sparsity:g}"]
        cells.append(f"{dense['time']['median']:.1f} ({dense['name']})")
        rows = [row for row in timed(record) if row["sparsity"] == sparsity]
        ours = [row for row in rows if row["name"] in BACKENDS]
        papers = [row for row in rows if row["name"] == "paper"]
        cells += [_fastest(some, dense["time"]["median"]) for some in (ours, papers)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _fastest(rows: list[dict[str, Any]], dense: float) -> str:
    """Return the time of the fastest row and how many times that of dense it is; nothing if there is none."""
    if not rows:
        return ""
    best = min(rows, key=lambda row: row["time"]["median"])
    time, name = best["time"]["median"], "" if best["name"] == "paper" else f" ({best['name']})"
    return f"{time:.1f}{name}, **{dense / time:.2f}x**"


def _best_dense_step(record: dict[str, Any]) -> dict[str, Any]:
    dense = [step for step in record["steps"][:-1] if step["name"] not in NOT_DENSE and step.get("density") is None]
    return min(dense, key=lambda step: step["step_ms"])


def _step_name(record: dict[str, Any]) -> str:
    config = record["options"].get("config")  # records of 0.1 have the sparsity in a name
    sparsity = f"{config['sparsity']:g}" if config else record["steps"][-1]["name"].removeprefix("draft ")
    return f"{record['model']}, {compiled(record)}, sparsity {sparsity}"


def _over_gpus(record: dict[str, Any]) -> str:
    prediction, draft, dense = record["prediction"], record["steps"][-1], _best_dense_step(record)
    cells = [
        f"{_step_name(record)}, {gpus(record)} x {record['environment']['device']}",
        f"{ms(record, ONE_GPU):.0f}",
        f"{draft['step_ms']:.0f}, **{prediction['gpu_speedup']:.2f}x**",
        f"{prediction['exchange_share']:.0%}",
        f"{dense['step_ms']:.0f} ({dense['name']})",
    ]
    return f"| {' | '.join(cells)} |"


def _step(record: dict[str, Any]) -> str:
    prediction, draft, dense = record["prediction"], record["steps"][-1], _best_dense_step(record)
    rest = ms(record, NO_ATTENTION)
    cells = [
        _step_name(record),
        f"{dense['step_ms']:.0f} ({dense['name']})",
        f"{prediction['sparse_step_ms']:.0f}, **{prediction['step_speedup']:.2f}x**",
        f"{1 - rest / dense['step_ms']:.0%} dense, {1 - rest / draft['step_ms']:.0%} draft",
        f"{prediction['draft_s']:.0f} for {prediction['dense_s']:.0f}, {prediction['run_speedup']:.2f}x",
        f"{draft['memory_gib']:.2f} for {dense['memory_gib']:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def _runs(record: dict[str, Any]) -> list[str]:
    """Return a row for each run of a model; the first is the best dense one."""
    name = f"{record['model']}, {compiled(record)}, {record['environment']['device']}"
    best = record["runs"][0]["seconds"]
    lines = []
    for run in record["runs"]:
        some = "" if len(run["step_s"]) == run["steps"] else f" ({len(run['step_s'])} timed)"
        cells = [f"{name}: {run['name']}", f"{run['steps']}{some}", f"{run['seconds']:.0f}"]
        cells.append(f"**{best / run['seconds']:.2f}x**")
        cells.append("" if run["predicted_s"] is None else f"{run['predicted_s']:.0f}")
        cells.append(f"{run['memory_gib']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
