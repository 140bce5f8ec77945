"""The demo's pipeline: a small trained Wan model that comes with the package."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline
from diffusers.utils import logging as logging_of_diffusers
from transformers.utils import logging as logging_of_transformers

from ..generation.loading import from_pretrained
from .scenes import WORDS, unknown_words

WEIGHTS = Path(__file__).parent / "weights"
"""The pipeline's folder; its README.md is the model card, and prompts.txt holds captions to try."""


def demo_pipeline() -> Any:
    """Load the demo's `WanPipeline` on the CPU in float32.

    A token of its transformer is 8 x 8 pixels of two frames (of one in the beginning).
    """
    with _without_bars(), torch.random.fork_rng(devices=[]):  # loading draws random weights first
        return from_pretrained(WanPipeline, str(WEIGHTS), torch.float32)


def check_prompt(prompt: str) -> None:
    """Raise ValueError for a prompt that the model cannot understand.

    Raises:
        ValueError: for an empty prompt or a word that is in no caption it was trained on.
    """
    if unknown := unknown_words(prompt):
        raise ValueError(
            f"The demo's model does not know {', '.join(map(repr, unknown))}. It knows {' '.join(WORDS)}. "
            "For example: 'a big red plain star moving left over blue waves, camera still'."
        )
    if not prompt.strip():
        raise ValueError("The prompt is empty.")


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Hide the progress bars of loading, which takes less than a second."""
    shown = [bars for bars in (logging_of_diffusers, logging_of_transformers) if bars.is_progress_bar_enabled()]
    for bars in shown:
        bars.disable_progress_bar()
    try:
        yield
    finally:
        for bars in shown:
            bars.enable_progress_bar()
