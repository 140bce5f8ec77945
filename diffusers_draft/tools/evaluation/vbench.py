"""VBench's scores of a study's clips, if VBench is installed."""

import json
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


def score(videos: Path, output: Path, device: torch.device) -> dict[str, float]:
    """Score a folder of mp4 files with VBench.

    Args:
        videos: the folder.
        output: the folder for VBench's own files.
        device: the device of its models.

    Returns:
        The mean of each dimension.
    """
    from vbench import VBench

    output.mkdir(parents=True, exist_ok=True)
    result = output / "clips_eval_results.json"
    # The second argument, the list of VBench's own prompts, is not needed for videos of other prompts.
    VBench(device, "", str(output)).evaluate(
        videos_path=str(videos), name="clips", dimension_list=list(DIMENSIONS), mode="custom_input"
    )
    return {dimension: float(values[0]) for dimension, values in json.loads(result.read_text()).items()}
