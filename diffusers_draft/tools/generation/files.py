"""Atomic writing of files."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def whole_or_not(path: Path, write: Callable[[Any], object]) -> None:
    """Write a file atomically: after a crash it is complete, or as it was before.

    Args:
        path: the file.
        write: writes the content to the file object that it gets, which is open for bytes.

    Raises:
        OSError: if the file cannot be written; a file that existed before is unchanged.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise OSError(f"{path} could not be written: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)
