"""VBench's scores of the same clips, where VBench is installed."""

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
"""Those that VBench computes for any prompt."""


def check_installed() -> None:
    """Raises ImportError, which says how to get VBench, if it is missing."""
    if find_spec("vbench") is None:
        raise ImportError(
            "--vbench needs VBench, which pins old packages: install it by 'pip install vbench' in an environment of "
            "its own, with diffusers-draft[eval] beside it, and run the same command there: finished clips are kept."
        )


def score(videos: Path, output: Path, device: torch.device) -> dict[str, float]:
    """Scores a folder of mp4 files.

    Args:
        videos: the folder.
        output: where VBench writes its own files.
        device: where its models run.

    Returns:
        The mean of each dimension.
    """
    from vbench import VBench

    output.mkdir(parents=True, exist_ok=True)
    result = output / "clips_eval_results.json"
    # The second argument is the list of VBench's own prompts, which videos of other prompts do not need.
    VBench(device, "", str(output)).evaluate(
        videos_path=str(videos), name="clips", dimension_list=list(DIMENSIONS), mode="custom_input"
    )
    return {dimension: float(values[0]) for dimension, values in json.loads(result.read_text()).items()}
