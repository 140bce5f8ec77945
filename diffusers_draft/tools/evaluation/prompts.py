"""Reading of prompts from a file."""

import csv
from pathlib import Path


def read_prompts(path: Path) -> list[str]:
    """Read prompts from a text file, one per line, or from the column `prompt` of a `.csv` file.

    The Penguin Video Benchmark of HunyuanVideo is such a CSV. Repeated prompts are kept once.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if the file is not UTF-8 text, has no such column, or has no prompt.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    lines = _column(path, text) if path.suffix.lower() == ".csv" else text.splitlines()
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not prompts:
        raise ValueError(f"{path} holds no prompt.")
    return prompts


def _column(path: Path, text: str) -> list[str]:
    """Read the column `prompt` of a CSV."""
    reader = csv.DictReader(text.splitlines(keepends=True))
    try:
        names, rows = list(reader.fieldnames or ()), list(reader)
    except csv.Error as error:
        raise ValueError(f"{path} cannot be read as CSV: {error}. Is a quote not closed?") from error
    name = next((name for name in names if name.strip().lower() == "prompt"), None)
    if name is None:
        raise ValueError(f"{path} needs a column named prompt; its first line has {', '.join(names) or 'nothing'}.")
    return [row[name] or "" for row in rows]
