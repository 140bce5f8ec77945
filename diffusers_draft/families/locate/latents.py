"""Grids of tokens, read from the shape of the latents."""

import math
from collections.abc import Sequence
from typing import Any

from ...attention.layout import Grid
from ..family import Inputs, VideoTokens


def patched(sizes: Sequence[int], patch: Sequence[int]) -> Grid:
    """Tokens of `(F, H, W)` latents; as diffusers does, a rest that fills no patch is left out."""
    frames, rows, columns = (size // side for size, side in zip(sizes, patch, strict=True))
    return frames, rows, columns


def patch_of(config: Any) -> Sequence[int]:
    """A model's `(t, h, w)` patch; some give height and width as one number, and may have none in time."""
    size = config.patch_size
    return (getattr(config, "patch_size_t", None) or 1, size, size) if isinstance(size, int) else size


def channels_first(inputs: Inputs, config: Any) -> VideoTokens:
    """All tokens of `hidden_states` `(B, C, F, H, W)`."""
    return VideoTokens(grid=patched(inputs["hidden_states"].shape[2:], patch_of(config)))


def channels_last(inputs: Inputs, config: Any) -> VideoTokens:
    """All tokens of `hidden_states` `(B, F, H, W, C)`."""
    return VideoTokens(grid=patched(inputs["hidden_states"].shape[1:4], patch_of(config)))


def frames_first(inputs: Inputs, config: Any) -> VideoTokens:
    """All tokens of `hidden_states` `(B, F, C, H, W)`."""
    frames, _, rows, columns = inputs["hidden_states"].shape[1:]
    return VideoTokens(grid=patched((frames, rows, columns), patch_of(config)))


def history(inputs: Inputs, name: str, patch: Sequence[int], coarseness: int) -> int:
    """Tokens of latents `(B, C, F, H, W)` that a model puts in front, if it is given both them and their indices.

    Those of coarser patches are padded until they fill them.
    """
    latents, indices = inputs.get(name), inputs.get(f"indices_{name}")
    if latents is None or indices is None:
        return 0
    sizes = latents.shape[2:]
    if coarseness == 1:
        return math.prod(patched(sizes, patch))
    return math.prod(-(-size // (side * coarseness)) for size, side in zip(sizes, patch, strict=True))
