"""Video files: a check in advance, encoding, and saving the frames when encoding fails."""

import subprocess
import tempfile
from pathlib import Path
from typing import Any

import imageio
import imageio_ffmpeg
import numpy as np

from .files import replacing


def check_writable(path: Path, fps: float) -> None:
    """Check that a video can be written later, by encoding a tiny one in the same folder at the same frame rate.

    Raises:
        OSError: if encoding fails: the folder is not writable, the disk is full, or ffmpeg does not work.
        ValueError: if the file name does not end in .mp4.
    """
    if path.suffix != ".mp4":
        raise ValueError(f"Videos are written as .mp4, got {path.name!r}.")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder.")
    path.parent.mkdir(parents=True, exist_ok=True)
    trial = path.resolve().with_name(f".{path.stem}.trial.mp4")
    write_video(np.zeros((1, 32, 32, 3), np.uint8), trial, fps)
    trial.unlink()


def write_video(frames: np.ndarray, path: Path, fps: float) -> None:
    """Encode `(F, H, W, 3)` uint8 frames as H.264 in an mp4 file, which is complete or absent.

    Raises:
        OSError: if ffmpeg fails, for example on a full disk.
    """
    try:
        with replacing(path) as part:
            _encode(frames, part, fps)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(":")
        raise OSError(
            f"ffmpeg could not write a video in {path.parent} ({reason}). Is the disk full, is imageio-ffmpeg whole?"
        ) from error


def _encode(frames: np.ndarray, path: Path, fps: float) -> None:
    writer: Any = imageio.get_writer(path, fps=fps, quality=8, macro_block_size=2, ffmpeg_log_level="quiet")
    with writer:
        for frame in frames:
            writer.append_data(frame)
    # If ffmpeg fails at the end, imageio raises nothing.
    written, _ = imageio_ffmpeg.count_frames_and_secs(str(path))
    if written != len(frames):
        raise OSError(f"{written} of {len(frames)} frames written")


def keep_frames(frames: np.ndarray, path: Path) -> Path:
    """Save the frames of a video that could not be encoded, beside its file or else in a temporary folder.

    Returns:
        The file, an `.npz` with one array `frames`.

    Raises:
        OSError: if the frames can be written in neither folder.
    """
    beside = path.with_suffix(".npz")
    try:
        _save(frames, beside)
        return beside
    except OSError:
        elsewhere = Path(tempfile.mkdtemp(prefix="diffusers-draft-")) / beside.name
        _save(frames, elsewhere)
        return elsewhere


def _save(frames: np.ndarray, path: Path) -> None:
    with replacing(path) as part:
        np.savez_compressed(part, frames=frames)
