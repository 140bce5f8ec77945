"""A benchmark's rows as pictures: time against sparsity, and error against time."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .attention import PAPER, UNCORRECTED, Row
from .table import best_dense

FORMATS = (".png", ".jpg", ".webp", ".pdf", ".svg")
"""Endings of the files that pictures are written to."""


def plot(rows: list[Row], path: Path, title: str) -> None:
    """Plot time against sparsity for every backend, with the best dense time and the ideal line."""
    best, sparse = best_dense(rows), [row for row in rows if row.kind in ("draft", "rival")]
    with _axes(path, xlabel="sparsity", ylabel="ms", title=title) as axes:
        for label, points in _times(sparse).items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
        if best:
            axes.axhline(best[1], color="black", linewidth=1, label=f"best dense ({best[0]})")
            ideal = sorted((sparsity, best[1] * density) for sparsity, density in _densities(sparse).items())
            axes.plot(*zip(*ideal, strict=True), color="gray", linestyle="--", label="ideal: dense x density")
        axes.set_ylim(bottom=0)


def plot_error(rows: list[Row], path: Path, title: str) -> None:
    """Plot the error against dense attention over the time, a line for each method and a point for each sparsity."""
    from matplotlib.ticker import LogFormatter

    best = best_dense(rows)
    with _axes(path, xlabel="ms", ylabel="relative error against dense", title=title) as axes:
        axes.set(xscale="log", yscale="log")
        for label, points in _errors(rows).items():
            sparsities, times, errors = zip(*sorted(points), strict=True)
            axes.plot(times, errors, marker="o", label=label)
            for text, *point in zip(sparsities, times, errors, strict=True):
                axes.annotate(f"{text:g}", point, xytext=(4, 4), textcoords="offset points", fontsize="small")
        if best:
            axes.axvline(best[1], color="black", linewidth=1, label=f"best dense ({best[0]})")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(LogFormatter())
            axis.set_minor_formatter(LogFormatter())


@contextlib.contextmanager
def _axes(path: Path, **settings: Any) -> Iterator[Any]:
    """Give axes to draw on, then put the legend below, where it hides nothing, and write the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    axes.set(**settings)
    yield axes
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _times(rows: list[Row]) -> dict[str, list[tuple[float, float]]]:
    """Return (sparsity, ms) of each backend and budget."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.time and row.sparsity is not None:
            label = f"{row.name}, {row.budget} budget" if row.budget else row.name
            lines.setdefault(label, []).append((row.sparsity, row.time.median))
    return lines


def _densities(rows: list[Row]) -> dict[float, float]:
    """Return the least density at each sparsity: those of budgets differ a little, and the ideal is one line."""
    densities: dict[float, float] = {}
    for row in rows:
        if row.sparsity is not None and row.density is not None:
            densities[row.sparsity] = min(row.density, densities.get(row.sparsity, 1.0))
    return densities


def _errors(rows: list[Row]) -> dict[str, list[tuple[float, float, float]]]:
    """Return (sparsity, ms, error) of each method; of its backends, which differ in time alone, the fastest."""
    fastest: dict[tuple[str, float], tuple[float, float]] = {}
    for row in rows:
        if row.time and row.dense_error is not None and row.sparsity is not None:
            key, point = (_method(row), row.sparsity), (row.time.median, row.dense_error)
            fastest[key] = min(point, fastest.get(key, point))
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for (method, sparsity), point in fastest.items():
        lines.setdefault(method, []).append((sparsity, *point))
    return lines


def _method(row: Row) -> str:
    if row.kind == "rival" or row.name == PAPER:
        return row.name
    name = UNCORRECTED if row.name == UNCORRECTED else "draft attention"
    return f"{name}, {row.budget} budget"
