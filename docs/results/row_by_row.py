"""Every row of every record of speed: what `docs/speed.md` holds."""

from typing import Any

import speed_records
from speed_records import best_dense, compiled, dtype, gpus, ms

from diffusers_draft.tools.bench.step import NO_ATTENTION, ONE_GPU

HEAD = """# Speed, row by row

What the tables of [Speed](benchmarks.md#the-tables) are made from, with the command of each record. The command of a
forward's record has no `--default`, which its row *diffusers default* takes by now."""


def speed_page() -> str:
    """Return every row of every record in Markdown: what `docs/speed.md` holds."""
    records = speed_records.load().values()
    attention = [_attention(record) for record in records if "rows" in record]
    models = [_model(record) for record in records if "prediction" in record]
    runs = [_run(record) for record in records if "runs" in record]
    return "\n\n".join([HEAD, *runs, *attention, *models])


def _run(record: dict[str, Any]) -> str:
    """Return the steps of every run of a model."""
    lines = [
        f"**{record['model']}**: whole runs through diffusers' pipeline with random weights, {compiled(record)}.",
        "",
        "| attention | seconds of each step that was timed | density of each forward |",
        "|---|---|---|",
    ]
    for run in record["runs"]:
        seconds = ", ".join(f"{step:.2f}" for step in run["step_s"])
        densities = "1" if run["densities"] is None else ", ".join(f"{density:.2f}" for density in run["densities"])
        lines.append(f"| {run['name']} | {seconds} | {densities} |")
    return "\n".join([*lines, "", _source(record)])


def _attention(record: dict[str, Any]) -> str:
    best = best_dense(record)["time"]["median"]
    frames, height, width = record["shape"]["grid"]
    shape = record["shape"]
    tokens = f"{frames * height * width:,} video tokens ({frames} x {height} x {width})"
    text = f" and {shape['text']} of text" if shape["text"] else ""
    lines = [
        f"**{record['name']}**: one attention call, {tokens}{text}, {shape['heads']} heads of {shape['head_dim']}, "
        f"batch {shape['batch']}, {dtype(record)}, {record['inputs']} inputs.",
        "",
        "| | sparsity | density | ms (quartiles) | against the best dense | of ideal | error |",
        "|---|---|---|---|---|---|---|",
    ]
    compared = any(row.get("dense_error") is not None for row in record["rows"])
    if compared:
        lines[-2:] = [f"{lines[-2]} against dense |", f"{lines[-1]}---|"]
    for row in (row for row in record["rows"] if row["time"]):
        time = row["time"]
        names = {
            "dense": "dense, {name}",
            "draft": "draft, {name}, {budget} budget",
            "stage": "{name}, {budget} budget",
            "rival": "{name}",
        }
        cells = [names[row["kind"]].format(**row)]
        cells.append("" if row["sparsity"] is None else f"{row['sparsity']:g}")
        cells.append("1" if row["density"] is None else f"{row['density']:.3f}")
        cells.append(f"{time['median']:.2f} ({time['low']:.2f} to {time['high']:.2f})")
        if row["kind"] == "stage":
            cells += ["", "", ""]
        else:
            ratio = best / time["median"]
            cells += [f"{ratio:.2f}x", f"{ratio * (row['density'] or 1):.0%}", f"{row['error']:.0e}"]
        if compared:
            cells.append("" if row.get("dense_error") is None else f"{row['dense_error']:.1e}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _source(record)])


def _model(record: dict[str, Any]) -> str:
    prediction = record["prediction"]
    rest = ms(record, NO_ATTENTION)
    lines = [
        f"**{record['model']}**: one forward of the transformer at its real width with random weights, "
        f"{compiled(record)}{f', on {gpus(record)} GPUs' if gpus(record) else ''}, summed from measured blocks.",
        "",
        "| attention | ms | of it attention | memory beyond weights, GiB |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {step['name']} | {step['step_ms']:.0f} | {1 - rest / step['step_ms']:.0%} | {step['memory_gib']:.2f} |"
        for step in record["steps"]
        if step["name"] != ONE_GPU
    ]
    run = (
        f"With dense layers, if there are, a sparse step takes {prediction['sparse_step_ms']:.0f} ms on average, "
        f"{prediction['step_speedup']:.2f}x faster than the best dense one. A run of {prediction['steps']} steps, "
        f"{prediction['dense_steps']} of them dense, is predicted to take {prediction['draft_s']:.0f} s instead of "
        f"{prediction['dense_s']:.0f} s ({prediction['run_speedup']:.2f}x)."
    )
    if gpus(record):
        run = (
            f"With all layers sparse one GPU takes {ms(record, ONE_GPU):.0f} ms: {gpus(record)} are "
            f"{prediction['gpu_speedup']:.2f}x as fast; exchanges alone would take "
            f"{prediction['exchange_share']:.0%} of their time. {run}"
        )
    return "\n".join([*lines, "", run, "", _source(record)])


def _source(record: dict[str, Any]) -> str:
    facts = record["environment"]
    packages = ("torch", "triton", "flash-attn-4", "block-sparse-attn", "comfy-kitchen", "diffusers")
    versions = ", ".join(f"{name} {facts[name]}" for name in packages if name in facts)
    return f"{facts['device']}, {versions}, {facts['date']}: `{facts['command']}`"
