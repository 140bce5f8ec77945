"""Wan 2.1 and 2.2, VACE and Animate: self-attention over video tokens alone, text enters by cross-attention."""

import dataclasses
from typing import Any

from . import splits
from .family import Family, Inputs, Refusal, VideoTokens
from .locate.latents import channels_first


def behind_reference(inputs: Inputs, config: Any) -> VideoTokens:
    """Locate the video tokens, of `hidden_states` `(B, C, F, H, W)` without its first frame, the character.

    As in diffusers, transformer_wan_animate.py `forward`.
    """
    frames, rows, columns = channels_first(inputs, config).grid
    return VideoTokens(grid=(frames - 1, rows, columns), prefix=rows * columns)


WAN = Family(
    name="Wan 2.1 and 2.2",
    layers=("blocks.*.attn1",),
    processors=("WanAttnProcessor",),
    video=channels_first,
    dense_timestep=925.0,
    dense_layers=("blocks.0.attn1",),
    split=splits.WAN,
)

WAN_VACE = dataclasses.replace(
    WAN,
    name="Wan VACE",
    layers=("vace_blocks.*.attn1", "blocks.*.attn1"),
    split=splits.WAN_VACE,
    dense_layers=("vace_blocks.0.attn1", "blocks.0.attn1"),
)

WAN_ANIMATE = dataclasses.replace(
    WAN,
    name="Wan Animate",
    video=behind_reference,
    split=Refusal("its face adapter attends within single frames, and a share of the tokens need not be whole frames"),
)
