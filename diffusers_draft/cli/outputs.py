"""Files that a command writes: checked before the work starts, and complete or as they were."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..tools.generation.files import replacing
from . import CommandError
from .packages import check_packages

TRIAL = bytes(1 << 20)
"""Written and removed again, to find a full disk. More than any record or picture has."""


def check_output(path: Path) -> None:
    """Check that a file can be written later. Nothing is left behind, and what is there already stays.

    Raises:
        CommandError: for a missing folder, a path that is no file, one that is not writable, or a full disk.
    """
    if not path.parent.is_dir():
        raise CommandError(f"{path} cannot be written: there is no folder {path.parent}")
    if path.exists() and not path.is_file():
        raise CommandError(f"{path} cannot be written: it is not a file")
    if path.exists():
        with _writing(path):
            path.open("ab").close()
    write_output(path, lambda part: part.write_bytes(TRIAL), keep=False)


def check_picture(path: Path, formats: tuple[str, ...]) -> None:
    """Check that a picture can be drawn and written later, as `check_output`.

    Raises:
        CommandError: also for an ending that is not among the formats, or without matplotlib.
    """
    if path.suffix.lower() not in formats:
        raise CommandError(f"Pictures are written as {', '.join(formats)}, got {path.name!r}")
    check_packages("demo", "matplotlib")
    check_output(path)


def write_output(path: Path, write: Callable[[Path], object], *, keep: bool = True) -> None:
    """Write a file beside its place and then move it there.

    Args:
        path: its place.
        write: writes to the path that it gets.
        keep: False removes the file instead of moving it.

    Raises:
        CommandError: if it cannot be written; what was at its place stays.
    """
    with _writing(path), replacing(path, keep=keep) as part:
        write(part)


def write_record(path: Path | None, record: dict[str, Any]) -> None:
    """Write a record as JSON, if a file was asked for.

    Raises:
        CommandError: as `write_output`.
    """
    if path:
        text = json.dumps(record, indent=1) + "\n"
        write_output(path, lambda part: part.write_text(text))


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CommandError(f"{path} cannot be written: {error.strerror or error}") from error
