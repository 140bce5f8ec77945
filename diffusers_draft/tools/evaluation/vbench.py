"""VBench's scores of a study's clips, if VBench is installed."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import torch

DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)
"""Dimensions that VBench can score for any prompt."""


def check_installed() -> None:
    """Raise ImportError if VBench is missing; the message says how to install it."""
    if find_spec("vbench") is None:
        raise ImportError(
            "--vbench needs VBench, which pins old packages: install it by 'pip install vbench' in an environment of "
            "its own, with diffusers-draft[eval] beside it, and run the same command there: finished clips are kept."
        )


def scores(videos: dict[str, list[Path]], folder: Path, device: torch.device) -> dict[str, dict[str, float]]:
    """Score mp4 files with VBench.

    Args:
        videos: the files of each setting.
        folder: for VBench's own files, and for links to those that it shall score.
        device: the device of its models.

    Returns:
        The mean of each dimension, by setting.
    """
    found = {}
    for name, paths in videos.items():
        linked = folder / name / "clips"
        shutil.rmtree(linked, ignore_errors=True)
        linked.mkdir(parents=True)
        for path in paths:
            (linked / path.name).symlink_to(path.resolve())
        found[name] = _score(linked, folder / name, device)
    return found


def _score(videos: Path, output: Path, device: torch.device) -> dict[str, float]:
    """Score all files of a folder; return the mean of each dimension."""
    from vbench import VBench

    result = output / "clips_eval_results.json"
    # The second argument, the list of VBench's own prompts, is not needed for videos of other prompts.
    VBench(device, "", str(output)).evaluate(
        videos_path=str(videos), name="clips", dimension_list=list(DIMENSIONS), mode="custom_input"
    )
    return {dimension: float(values[0]) for dimension, values in json.loads(result.read_text()).items()}
