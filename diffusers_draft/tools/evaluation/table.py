"""Table of a study: one row for each setting, from the records of clips."""

import csv
import io
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import numpy as np

from .statistics import Estimate, estimate
from .store import Json

CLIP_COLUMNS = ("density", "computed", "psnr", "ssim", "lpips", "flicker_difference")
ATTENTION_COLUMNS = ("error", "kept", "oracle")


def table(clips: Sequence[Json], attention: Sequence[Json] = ()) -> list[Json]:
    """Compute one row for each setting: means over prompts of the means over seeds, with their intervals.

    Args:
        clips: records of clips, including those of the dense runs.
        attention: records of attention calls.

    Returns:
        Rows with `setting`, `prompts`, `clips` and one `Estimate` for each column that was measured in all clips.
        `speedup` is the ratio to the dense run of the same prompt and seed. It and `seconds` leave out each process's
        first clip of a setting, which includes warming up, if there are others.
    """
    dense = {(clip["prompt"], clip["seed"]): clip for clip in clips if clip["setting"] == "dense"}
    timed = all("seconds" in clip for clip in clips)
    rows = []
    for name in dict.fromkeys(clip["setting"] for clip in clips):
        mine = [clip for clip in clips if clip["setting"] == name]
        row: Json = {"setting": name, "prompts": len({clip["prompt"] for clip in mine}), "clips": len(mine)}
        for column in CLIP_COLUMNS:
            if all(column in clip for clip in mine):
                row[column] = over_prompts(mine, itemgetter(column))
        row |= _times(mine, dense) if timed else {}
        looked_at = [record for record in attention if record["setting"] == name]
        for column in ATTENTION_COLUMNS if looked_at else ():
            means = [r | {column: np.mean([call[column] for call in r["calls"]])} for r in looked_at]
            row[f"attention_{column}"] = over_prompts(means, itemgetter(column))
        rows.append(row)
    return rows


def _times(clips: Sequence[Json], dense: dict[tuple[str, int], Json]) -> Json:
    warm = [c for c in clips if c["warm"] and dense[c["prompt"], c["seed"]]["warm"]] or clips
    times: Json = {"seconds": over_prompts(warm, itemgetter("seconds"))}
    if clips[0]["setting"] != "dense":
        times["speedup"] = over_prompts(warm, lambda c: dense[c["prompt"], c["seed"]]["seconds"] / c["seconds"])
    return times


def over_prompts(records: Sequence[Json], value: Callable[[Json], Any]) -> Estimate:
    """Estimate the mean of a value over prompts, where each prompt is the mean of its records."""
    by_prompt: dict[str, list[float]] = {}
    for record in records:
        by_prompt.setdefault(record["prompt"], []).append(float(value(record)))
    return estimate([float(np.mean(values)) for values in by_prompt.values()])


def as_csv(rows: Sequence[Json]) -> str:
    """Write the rows as CSV; an estimate takes three columns: the mean, `_low` and `_high`."""
    flat: list[Json] = []
    for row in rows:
        line: Json = {}
        for column, cell in row.items():
            line |= _ends(column, cell) if isinstance(cell, Estimate) else {column: cell}
        flat.append(line)
    names = list(dict.fromkeys(name for row in flat for name in row))
    file = io.StringIO()
    writer = csv.DictWriter(file, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return file.getvalue()


def as_text(rows: Sequence[Json]) -> str:
    """Write the rows as a table for the terminal: means with half the width of their intervals."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names] + [[_cell(row.get(name, "")) for name in names] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def _ends(column: str, cell: Estimate) -> dict[str, float | None]:
    return {column: cell.mean, f"{column}_low": cell.low, f"{column}_high": cell.high}


def _cell(value: Any) -> str:
    if not isinstance(value, Estimate):
        return str(value)
    if value.low is None or value.high is None:
        return f"{value.mean:.4g}"
    return f"{value.mean:.4g} ±{(value.high - value.low) / 2:.2g}"
