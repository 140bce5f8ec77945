"""Locate the video tokens from the shape of the latents."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from ...attention.layout import Grid
from ..family import Inputs, VideoTokens


def patched(sizes: Sequence[int], patch: Sequence[int]) -> Grid:
    """Compute the `(T, Y, X)` grid of tokens of `(F, H, W)` latents; like diffusers, drop incomplete patches."""
    frames, rows, columns = (size // side for size, side in zip(sizes, patch, strict=True))
    return frames, rows, columns


def patch_of(config: Any) -> Sequence[int]:
    """Get a model's `(t, h, w)` patch size; some configs give height and width as one number, and time optionally."""
    size = config.patch_size
    return (getattr(config, "patch_size_t", None) or 1, size, size) if isinstance(size, int) else size


def latents_shape(inputs: Inputs, layout: str, name: str = "hidden_states") -> torch.Size:
    """Get the shape of the latents of a forward, as `layout` says: five letters.

    Raises:
        ValueError: if they do not have five dimensions.
    """
    shape = inputs[name].shape
    if len(shape) != 5:
        raise ValueError(f"{name} must be latents of shape ({layout}), got {tuple(shape)}.")
    return shape


def channels_first(inputs: Inputs, config: Any) -> VideoTokens:
    """Locate the video tokens, all tokens of `hidden_states` `(B, C, F, H, W)`."""
    return VideoTokens(grid=patched(latents_shape(inputs, "B, C, F, H, W")[2:], patch_of(config)))


def in_front_of_text(inputs: Inputs, config: Any) -> VideoTokens:
    """Locate the video tokens, of `hidden_states` `(B, C, F, H, W)`, in front of each sample's valid text.

    `encoder_attention_mask` is `(B, L)`, and only the number of its valid tokens counts.
    """
    grid = channels_first(inputs, config).grid
    text = inputs["encoder_attention_mask"].sum(dim=1, dtype=torch.int32)
    return VideoTokens(grid=grid, kv_len=text + math.prod(grid))


def channels_last(inputs: Inputs, config: Any) -> VideoTokens:
    """Locate the video tokens, all tokens of `hidden_states` `(B, F, H, W, C)`."""
    return VideoTokens(grid=patched(latents_shape(inputs, "B, F, H, W, C")[1:4], patch_of(config)))


def frames_first(inputs: Inputs, config: Any) -> VideoTokens:
    """Locate the video tokens, all tokens of `hidden_states` `(B, F, C, H, W)`."""
    frames, _, rows, columns = latents_shape(inputs, "B, F, C, H, W")[1:]
    return VideoTokens(grid=patched((frames, rows, columns), patch_of(config)))


def history(inputs: Inputs, name: str, patch: Sequence[int], coarseness: int) -> int:
    """Count the tokens of history latents `(B, C, F, H, W)`; they are used only if their indices are given too.

    Args:
        inputs: arguments of the forward.
        name: name of the latents among them.
        patch: `(t, h, w)` patch size of the video.
        coarseness: factor on the patch size. Above 1, upstream pads the latents to whole patches.
    """
    if inputs.get(name) is None or inputs.get(f"indices_{name}") is None:
        return 0
    sizes = latents_shape(inputs, "B, C, F, H, W", name)[2:]
    if coarseness == 1:
        return math.prod(patched(sizes, patch))
    return math.prod(-(-size // (side * coarseness)) for size, side in zip(sizes, patch, strict=True))
