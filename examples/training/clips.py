"""Clips of a batch, which depend on the seed and the batch's number alone, so that a training can be resumed."""

import numpy as np
import torch
from torch import Tensor

from diffusers_draft.tools.demo.drawing import draw
from diffusers_draft.tools.demo.scenes import Scenes, captions, sample_scenes

HELD_OUT = 1 << 31
"""First batch number of held-out clips, which are not trained on."""


def scenes(batch: int, height: int, width: int, seed: int, number: int) -> Scenes:
    """Sample the scenes of one batch, on the CPU."""
    return sample_scenes(batch, height, width, _generator(torch.device("cpu"), seed, number, 0))


def clips(
    device: torch.device, batch: int, size: tuple[int, int, int], seed: int, number: int
) -> tuple[Tensor, list[str]]:
    """Draw one batch of clips.

    Args:
        device: the device to draw on.
        batch: B, the number of clips.
        size: `(F, H, W)` in frames and pixels.
        seed: seed of the training.
        number: number of the batch.

    Returns:
        `(B, 3, F, H, W)` float32 in [-1, 1], and B captions.
    """
    frames, height, width = size
    chosen = scenes(batch, height, width, seed, number)
    with torch.no_grad():
        return draw(chosen.to(device), frames, height, width), captions(chosen)


def noise_generator(device: torch.device, seed: int, number: int) -> torch.Generator:
    """Make the generator of one batch's noise, on the device and independent of its scenes."""
    return _generator(device, seed, number, 1)


def _generator(device: torch.device, *numbers: int) -> torch.Generator:
    # Mix the numbers into 32 bits first: torch's CPU generator reads no more of a seed.
    return torch.Generator(device).manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))
