"""A benchmark's rows as a table of text."""

import itertools
from collections.abc import Iterable, Iterator

from .attention import PAPER, Row
from .shapes import Shape


def best_dense(rows: list[Row]) -> tuple[str, float] | None:
    """Find the fastest dense baseline, the reference of every speed-up; return its name and milliseconds."""
    timed = [(row.name, row.time.median) for row in rows if row.kind == "dense" and row.time]
    return min(timed, key=lambda pair: pair[1], default=None)


def table_lines(dense: list[Row], others: Iterable[Row], shape: Shape) -> Iterator[str]:
    """Write one line for each row as it comes, with ratios to the best dense time of the same run."""
    best, title = best_dense(dense), ""
    head = f"{'':34s} {'ms':>9s} {'quartiles':>19s} {'TFLOP/s':>8s} {'speed-up':>9s} {'of ideal':>9s} {'error':>8s}"
    yield f"{head} {'vs dense':>8s}"
    for row in itertools.chain(dense, others):
        if row.kind != "stage" and _title(row) != title:
            title = _title(row)
            yield title
        yield f"  {row.name:32s} {row.note or _numbers(row, shape, best)}"


def _title(row: Row) -> str:
    if row.kind == "dense":
        return "dense"
    settings = "another package" if row.kind == "rival" else f"{row.budget} budget"
    title = f"sparsity {row.sparsity:g}, {'settings of the paper' if row.name == PAPER else settings}"
    return title if row.density is None else f"{title}, density {row.density:.4f}"


def _numbers(row: Row, shape: Shape, best: tuple[str, float] | None) -> str:
    assert row.time is not None, "or there is a note"
    spread = f"[{row.time.low:.3f}, {row.time.high:.3f}]"
    numbers = f"{row.time.median:9.3f} {spread:>19s}"
    if row.kind == "stage":
        return numbers
    density = 1.0 if row.density is None else row.density
    speed = f"{shape.dense_flops * density / row.time.median / 1e9:8.1f}"
    ratio = f"{best[1] / row.time.median:8.2f}x" if best else ""
    ideal = f"{best[1] * density / row.time.median:8.0%}" if best else ""
    errors = f"{row.error:8.1e}" + ("" if row.dense_error is None else f" {row.dense_error:8.1e}")
    return f"{numbers} {speed} {ratio:>9s} {ideal:>9s} {errors}"
