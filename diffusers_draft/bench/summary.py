"""README's speed section, written from the recorded results."""

import json
from importlib.resources import files
from typing import Any


def speed_section() -> str:
    """Markdown tables of every file in `bench/results`."""
    records = [
        json.loads(path.read_text())
        for path in sorted(files(__package__).joinpath("results").iterdir(), key=lambda path: path.name)
        if path.name.endswith(".json")
    ]
    attention = [_attention(record) for record in records if "rows" in record]
    models = [_model(record) for record in records if "prediction" in record]
    return "\n\n".join(attention + models)


def _attention(record: dict[str, Any]) -> str:
    rows = [row for row in record["rows"] if row["time"] and row["kind"] != "stage"]
    best = min(row["time"]["median"] for row in rows if row["kind"] == "dense")
    frames, height, width = record["shape"]["grid"]
    shape = record["shape"]
    tokens = f"{frames * height * width:,} video tokens ({frames} x {height} x {width})"
    text = f" and {shape['text']} of text" if shape["text"] else ""
    lines = [
        f"**{record['name']}**: one attention call, {tokens}{text}, {shape['heads']} heads of {shape['head_dim']}, "
        f"batch {shape['batch']}, {record['dtype'].removeprefix('torch.')}, {record['inputs']} inputs.",
        "",
        "| | sparsity | density | ms (quartiles) | against the best dense | error |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        time = row["time"]
        name = f"dense, {row['name']}" if row["kind"] == "dense" else f"draft, {row['name']}, {row['budget']} budget"
        sparsity = "" if row["sparsity"] is None else f"{row['sparsity']:g}"
        density = "1" if row["density"] is None else f"{row['density']:.3f}"
        spread = f"{time['median']:.2f} ({time['low']:.2f} to {time['high']:.2f})"
        ratio = f"{best / time['median']:.2f}x"
        lines.append(f"| {name} | {sparsity} | {density} | {spread} | {ratio} | {row['error']:.0e} |")
    return "\n".join([*lines, "", _source(record)])


def _model(record: dict[str, Any]) -> str:
    prediction = record["prediction"]
    compiled = "compiled" if record["options"]["compiled"] else "eager"
    lines = [
        f"**{record['model']}**: one forward of the transformer at its real width with random weights, {compiled}, "
        "summed from measured blocks.",
        "",
        "| attention | ms | memory beyond weights, GiB |",
        "|---|---|---|",
    ]
    lines += [f"| {step['name']} | {step['step_ms']:.0f} | {step['memory_gib']:.2f} |" for step in record["steps"]]
    run = (
        f"With the family's dense layers a sparse step takes {prediction['sparse_step_ms']:.0f} ms, "
        f"{prediction['step_speedup']:.2f}x faster than the best dense one. A run of {prediction['steps']} steps, "
        f"{prediction['dense_steps']} of them dense, is predicted to take {prediction['draft_s']:.0f} s instead of "
        f"{prediction['dense_s']:.0f} s ({prediction['run_speedup']:.2f}x)."
    )
    return "\n".join([*lines, "", run, "", _source(record)])


def _source(record: dict[str, Any]) -> str:
    facts = record["environment"]
    packages = ("torch", "triton", "flash-attn-4", "diffusers")
    versions = ", ".join(f"{name} {facts[name]}" for name in packages if name in facts)
    return f"{facts['device']}, {versions}, {facts['date']}: `{facts['command']}`"
