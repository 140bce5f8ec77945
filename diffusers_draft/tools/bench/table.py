"""Output of a benchmark's rows: a table as text and a plot."""

from pathlib import Path

from .attention import Row
from .shapes import Shape


def best_dense(rows: list[Row]) -> tuple[str, float] | None:
    """Find the fastest dense baseline, the reference of every speed-up; return its name and milliseconds."""
    timed = [(row.name, row.time.median) for row in rows if row.kind == "dense" and row.time]
    return min(timed, key=lambda pair: pair[1], default=None)


def format_table(rows: list[Row], shape: Shape) -> str:
    """Write one line for each row, with ratios to the best dense time of the same run."""
    best = best_dense(rows)
    head = f"{'':34s} {'ms':>9s} {'quartiles':>19s} {'TFLOP/s':>8s} {'speed-up':>9s} {'of ideal':>9s} {'error':>8s}"
    lines = [head]
    group = None
    for row in rows:
        if row.kind != "stage" and (row.kind, row.sparsity, row.budget) != group:
            group = (row.kind, row.sparsity, row.budget)
            title = "dense" if row.kind == "dense" else f"sparsity {row.sparsity:g}, {row.budget} budget"
            lines.append(title if row.density is None else f"{title}, density {row.density:.4f}")
        if row.time is None:
            lines.append(f"  {row.name:32s} {row.note}")
            continue
        spread = f"[{row.time.low:.3f}, {row.time.high:.3f}]"
        line = f"  {row.name:32s} {row.time.median:9.3f} {spread:>19s}"
        if row.kind != "stage":
            density = 1.0 if row.density is None else row.density
            speed = f"{shape.dense_flops * density / row.time.median / 1e9:8.1f}"
            ratio = f"{best[1] / row.time.median:8.2f}x" if best else ""
            ideal = f"{best[1] * density / row.time.median:8.0%}" if best else ""
            line += f" {speed} {ratio:>9s} {ideal:>9s} {row.error:8.1e}"
        lines.append(line)
    return "\n".join(lines)


def plot(rows: list[Row], path: Path, title: str) -> None:
    """Plot time against sparsity for every backend, with the best dense time and the ideal line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    best = best_dense(rows)
    lines: dict[str, list[tuple[float, float]]] = {}
    ideal = set()
    for row in rows:
        if row.kind == "draft" and row.time and row.sparsity is not None and row.density is not None:
            lines.setdefault(f"{row.name}, {row.budget} budget", []).append((row.sparsity, row.time.median))
            ideal.add((row.sparsity, row.density))
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    if best:
        axes.axhline(best[1], color="black", linewidth=1, label=f"best dense ({best[0]})")
        if ideal:
            ideal = {(sparsity, best[1] * density) for sparsity, density in ideal}
            axes.plot(*zip(*sorted(ideal), strict=True), color="gray", linestyle="--", label="ideal: dense x density")
    axes.set(xlabel="sparsity", ylabel="ms", title=title, ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
