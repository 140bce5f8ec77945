"""Files that a crash cannot leave half written."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def whole_or_not(path: Path, write: Callable[[Any], object]) -> None:
    """Writes a file that a crash cannot leave half written.

    Args:
        path: the file.
        write: gets it, open for bytes.

    Raises:
        OSError: if it cannot be written; then a file that was there before is still there.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written: {error.strerror or error}") from error
