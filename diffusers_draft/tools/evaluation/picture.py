"""Plot of fidelity against computed work and against time."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .statistics import Estimate
from .store import Json


def draw(rows: Sequence[Json], file: Any, title: str) -> None:
    """Plot PSNR against the computed share of block pairs and against time, with 95 % intervals.

    Settings that differ in sparsity alone are joined by a line.

    Args:
        rows: rows from `table`.
        file: a path, or a file object open for bytes, to write a PNG to.
        title: title of the picture.
    """
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    left, right = figure.subplots(1, 2, sharey=True)
    groups: dict[str, list[Json]] = {}
    for row in rows:
        if row["setting"] != "dense":
            others = row["setting"].partition(",")[2]
            groups.setdefault(others, []).append(row)
    for label, members in groups.items():
        for axes, column in ((left, "computed"), (right, "seconds")):
            _line(axes, members, column, label)
    for row in rows:
        if row["setting"] == "dense":
            right.axvline(row["seconds"].mean, color="black", linewidth=1, linestyle="--", label="dense")
    left.set(xlabel="share of the run's block pairs that was computed", ylabel="PSNR to the dense video, dB")
    right.set(xlabel="seconds of denoising", xlim=(0, None))
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize="small", loc="outside lower center", ncols=2)
    figure.savefig(file, format="png", dpi=150)


def _line(axes: Axes, rows: list[Json], column: str, label: str) -> None:
    """Plot PSNR against one column, with error bars."""
    rows = sorted(rows, key=lambda row: row[column].mean)
    x, y = [row[column] for row in rows], [row["psnr"] for row in rows]
    options: dict[str, Any] = {"marker": "o", "markersize": 4, "capsize": 2, "linewidth": 1, "label": label}
    axes.errorbar([e.mean for e in x], [e.mean for e in y], yerr=_bars(y), xerr=_bars(x), **options)


def _bars(estimates: list[Estimate]) -> list[list[float]]:
    """Compute the lengths of the error bars, below and above; zero for an estimate without interval."""
    ends = [(e.mean, e.mean) if e.low is None or e.high is None else (e.low, e.high) for e in estimates]
    return [
        [max(e.mean - low, 0.0) for e, (low, _) in zip(estimates, ends, strict=True)],
        [max(high - e.mean, 0.0) for e, (_, high) in zip(estimates, ends, strict=True)],
    ]
