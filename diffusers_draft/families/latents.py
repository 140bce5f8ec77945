"""Grids of tokens, read from the shape of the latents."""

import math
from collections.abc import Sequence
from typing import Any

from . import Inputs, VideoTokens


def patched(sizes: Sequence[int], patch: Sequence[int]) -> VideoTokens:
    """Video tokens alone, after patching; as diffusers does, a rest that fills no patch is left out."""
    frames, rows, columns = (size // side for size, side in zip(sizes, patch, strict=True))
    return VideoTokens(grid=(frames, rows, columns))


def channels_first(inputs: Inputs, config: Any) -> VideoTokens:
    """Of `hidden_states` `(B, C, F, H, W)`."""
    return patched(inputs["hidden_states"].shape[2:], config.patch_size)


def channels_last(inputs: Inputs, config: Any) -> VideoTokens:
    """Of `hidden_states` `(B, F, H, W, C)`."""
    return patched(inputs["hidden_states"].shape[1:4], config.patch_size)


def frames_first(inputs: Inputs, config: Any) -> VideoTokens:
    """Of `hidden_states` `(B, F, C, H, W)`."""
    frames, _, rows, columns = inputs["hidden_states"].shape[1:]
    return patched((frames, rows, columns), config.patch_size)


def history(inputs: Inputs, name: str, patch: Sequence[int], coarseness: int) -> int:
    """Tokens of latents `(B, C, F, H, W)` that a model puts in front, if it is given both them and their indices.

    Those of coarser patches are padded until they fill them.
    """
    latents, indices = inputs.get(name), inputs.get(f"indices_{name}")
    if latents is None or indices is None:
        return 0
    sizes = latents.shape[2:]
    if coarseness == 1:
        return math.prod(patched(sizes, patch).grid)
    return math.prod(-(-size // (side * coarseness)) for size, side in zip(sizes, patch, strict=True))
