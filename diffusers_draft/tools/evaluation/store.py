"""The folder of a study: every finished result is a file, written atomically."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from ..generation.files import whole_or_not
from .settings import Setting

Json = dict[str, Any]

FOLDERS = ("clips", "dense", "attention", "videos")
"""In the folder of a study."""


class Store:
    """Stored results by prompt, seed and setting; a setting of None is the dense run.

    Attributes:
        folder: the folder of the results.
        facts: what all results have in common: the model and the arguments of its calls.
    """

    def __init__(self, folder: Path, facts: Json) -> None:
        """Open the folder of a study, or create it.

        Raises:
            OSError: if the folder cannot be created or written.
            ValueError: if the folder has results with other facts.
        """
        self.folder = folder
        self.facts = json.loads(json.dumps(facts))
        for name in FOLDERS:
            (folder / name).mkdir(parents=True, exist_ok=True)
        known = self._read("study")
        if known is None or not self._has_results():
            self._write("study", self.facts)
        elif known != self.facts:
            changed = sorted(key for key in known | self.facts if known.get(key) != self.facts.get(key))
            raise ValueError(
                f"{folder} holds results with {', '.join(f'{key} {known.get(key)!r}' for key in changed)}; now it is "
                f"{', '.join(repr(self.facts.get(key)) for key in changed)}. Choose another folder."
            )

    def _has_results(self) -> bool:
        return any(any((self.folder / name).glob("[!.]*.json")) for name in ("clips", "attention"))

    def clip(self, prompt: str, seed: int, setting: Setting | None) -> Json | None:
        """Read the record of a finished clip; return None if there is none."""
        return self._read(f"clips/{key(prompt, seed, setting)}")

    def save_clip(self, prompt: str, seed: int, setting: Setting | None, record: Json) -> None:
        """Write the record of a finished clip."""
        self._write(f"clips/{key(prompt, seed, setting)}", record)

    def attention(self, prompt: str, seed: int, setting: Setting) -> list[Json] | None:
        """Read the measurements of attention calls; return None if there are none."""
        record = self._read(f"attention/{key(prompt, seed, setting)}")
        return None if record is None else record["calls"]

    def save_attention(self, prompt: str, seed: int, setting: Setting, calls: list[Json]) -> None:
        """Write the measurements of attention calls."""
        record = {"prompt": prompt, "seed": seed, "setting": setting.name, "calls": calls}
        self._write(f"attention/{key(prompt, seed, setting)}", record)

    def dense_frames(self, prompt: str, seed: int) -> np.ndarray | None:
        """Read the frames of the dense run, `(F, H, W, 3)` uint8; return None if there are none."""
        return np.load(self._dense(prompt, seed))["frames"] if self.has_dense_frames(prompt, seed) else None

    def has_dense_frames(self, prompt: str, seed: int) -> bool:
        """Return True if there are frames of the dense run."""
        return self._dense(prompt, seed).exists()

    def save_dense_frames(self, prompt: str, seed: int, frames: np.ndarray) -> None:
        """Write the frames of the dense run, which other clips are compared with."""
        whole_or_not(self._dense(prompt, seed), lambda file: np.savez_compressed(file, frames=frames))

    def video(self, prompt: str, seed: int, setting: Setting | None) -> Path:
        """Return the path of a clip's mp4; create its folder."""
        folder = self.folder / "videos" / (setting.name if setting else "dense")
        folder.mkdir(exist_ok=True)
        words = re.sub(r"\W+", "-", prompt)[:40].strip("-")
        return folder / f"{words}-{seed}-{key(prompt, seed, None)[:8]}.mp4"

    def _dense(self, prompt: str, seed: int) -> Path:
        return self.folder / "dense" / f"{key(prompt, seed, None)}.npz"

    def _read(self, name: str) -> Any:
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def _write(self, name: str, record: Any) -> None:
        text = json.dumps(record, indent=1) + "\n"
        whole_or_not(self.folder / f"{name}.json", lambda file: file.write(text.encode()))


def key(prompt: str, seed: int, setting: Setting | None) -> str:
    """Compute the file name of a result, which depends on prompt, seed and options but not on their order."""
    what = json.dumps([prompt, seed, setting.options if setting else None], sort_keys=True)
    return hashlib.sha256(what.encode()).hexdigest()[:16]
