"""The records of speed in this folder, as `diffusers-draft bench` wrote them, and what several tables read in them."""

import json
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).parent / "bench"


def load() -> dict[str, dict[str, Any]]:
    """Read all records, by the names of their files."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(RECORDS.glob("*.json"))}


def dtype(record: dict[str, Any]) -> str:
    """Return the dtype of an attention call."""
    return record["dtype"].removeprefix("torch.")


def timed(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of whole attention calls that were timed."""
    return [row for row in record["rows"] if row["time"] and row["kind"] != "stage"]


def best_dense(record: dict[str, Any]) -> dict[str, Any]:
    """Return the fastest dense row."""
    dense = [row for row in timed(record) if row["kind"] == "dense"]
    return min(dense, key=lambda row: row["time"]["median"])


def gpus(record: dict[str, Any]) -> int:
    """Return over how many GPUs a step was split; 0 for one."""
    return record.get("options", {}).get("ulysses", 0)


def ms(record: dict[str, Any], name: str) -> float:
    """Return the milliseconds of a step."""
    return next(step["step_ms"] for step in record["steps"] if step["name"] == name)


def compiled(record: dict[str, Any]) -> str:
    """Say whether blocks were compiled."""
    return "compiled" if record["options"]["compiled"] else "eager"
