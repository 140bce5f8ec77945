"""Grids of tokens, read from the shape of the latents."""

from collections.abc import Sequence
from typing import Any

from . import Inputs, VideoTokens


def patched(frames: int, rows: int, columns: int, patch: Sequence[int]) -> VideoTokens:
    """Video tokens alone, after patching; as diffusers does, a rest that fills no patch is left out."""
    return VideoTokens(grid=(frames // patch[0], rows // patch[1], columns // patch[2]))


def channels_first(inputs: Inputs, config: Any) -> VideoTokens:
    """Of `hidden_states` `(B, C, F, H, W)`."""
    return patched(*inputs["hidden_states"].shape[2:], config.patch_size)


def channels_last(inputs: Inputs, config: Any) -> VideoTokens:
    """Of `hidden_states` `(B, F, H, W, C)`."""
    return patched(*inputs["hidden_states"].shape[1:4], config.patch_size)


def frames_first(inputs: Inputs, config: Any) -> VideoTokens:
    """Of `hidden_states` `(B, F, C, H, W)`."""
    frames, _, rows, columns = inputs["hidden_states"].shape[1:]
    return patched(frames, rows, columns, config.patch_size)
