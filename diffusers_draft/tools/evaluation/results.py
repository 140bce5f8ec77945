"""Result files of a study: JSON with every clip, CSV with a row for each setting, and a picture."""

import dataclasses
import json
from pathlib import Path

import torch

from ..bench.measure import environment
from ..generation.files import whole_or_not
from . import vbench
from .picture import draw
from .statistics import Estimate
from .store import Json
from .study import Study
from .table import as_csv, table

NAMES = ("results.json", "results.csv", "fidelity.png")


def write_results(study: Study, device: torch.device, title: str, *, with_vbench: bool = False) -> list[Json]:
    """Write the result files, `NAMES`, into the study's folder.

    Args:
        study: the study; its finished clips count.
        device: the device that made the clips, for the record.
        title: title of the picture.
        with_vbench: whether to score the clips with VBench.

    Returns:
        The rows of the table.

    Raises:
        OSError: if a file cannot be written.
    """
    folder = study.store.folder
    clips, attention = study.records(), study.attention_records()
    rows = table(clips, attention)
    record = {"environment": environment(device), "facts": study.store.facts, "rows": [_plain(row) for row in rows]}
    record |= {"clips": clips, "attention": attention}
    _write(folder, record | (_scores_before(folder) if with_vbench else {}))
    whole_or_not(folder / NAMES[1], lambda file: file.write(as_csv(rows).encode()))
    whole_or_not(folder / NAMES[2], lambda file: draw(rows, file, title))
    if with_vbench:
        _write(folder, record | {"vbench": vbench.scores(study.videos_made(), folder / "vbench", device)})
    return rows


def read_results(path: Path) -> list[Json]:
    """Compute the rows of the table from the clips and attention calls in a `results.json`."""
    record = json.loads(path.read_text())
    return table(record["clips"], record["attention"])


def _scores_before(folder: Path) -> Json:
    """Read VBench's scores of an earlier run, which stay if it fails in this one."""
    path = folder / NAMES[0]
    before = json.loads(path.read_text()) if path.exists() else {}
    return {"vbench": before["vbench"]} if "vbench" in before else {}


def _write(folder: Path, record: Json) -> None:
    whole_or_not(folder / NAMES[0], lambda file: file.write((json.dumps(record, indent=1) + "\n").encode()))


def _plain(row: Json) -> Json:
    return {key: dataclasses.asdict(cell) if isinstance(cell, Estimate) else cell for key, cell in row.items()}
