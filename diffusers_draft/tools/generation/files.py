"""Atomic writing of files."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path, *, keep: bool = True) -> Iterator[Path]:
    """Write a file atomically: after a crash it is complete, or as it was before. A link stays one.

    Args:
        path: the file.
        keep: False only tries it.

    Yields:
        A path in the same folder with the same ending, to write to.
    """
    place = path.resolve()
    part = place.with_name(f".{place.stem}.part{path.suffix}")
    try:
        yield part
        with part.open("rb+") as written:
            os.fsync(written.fileno())
        if keep:
            part.replace(place)
    finally:
        part.unlink(missing_ok=True)


def whole_or_not(path: Path, write: Callable[[Any], object]) -> None:
    """Write a file atomically: after a crash it is complete, or as it was before.

    Args:
        path: the file.
        write: writes the content to the file object that it gets, which is open for bytes.

    Raises:
        OSError: if the file cannot be written; a file that existed before is unchanged.
    """
    try:
        with replacing(path) as part, part.open("wb") as file:
            write(file)
    except OSError as error:
        raise OSError(f"{path} could not be written: {error.strerror or error}") from error
