"""Wan 2.1 and 2.2: self-attention holds video tokens alone, text enters by cross-attention."""

import dataclasses
from typing import Any

from . import Family, Inputs, VideoTokens


def video(inputs: Inputs, config: Any) -> VideoTokens:
    """Tokens of `hidden_states` `(B, C, F, H, W)` after patching (diffusers, transformer_wan.py `forward`)."""
    frames, rows, columns = inputs["hidden_states"].shape[2:]
    patch_t, patch_h, patch_w = config.patch_size
    return VideoTokens(grid=(frames // patch_t, rows // patch_h, columns // patch_w))


WAN = Family(
    name="Wan 2.1 and 2.2",
    pipelines=("WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline"),
    layers=("blocks.*.attn1",),
    processors=("WanAttnProcessor",),
    video=video,
    dense_timestep=925.0,
    dense_layers=("blocks.0.attn1",),
    text="cross-attention",
)

WAN_VACE = dataclasses.replace(
    WAN,
    name="Wan VACE",
    pipelines=("WanVACEPipeline",),
    layers=("vace_blocks.*.attn1", "blocks.*.attn1"),
    dense_layers=("vace_blocks.0.attn1", "blocks.0.attn1"),
)

WAN_ANIMATE = dataclasses.replace(WAN, name="Wan Animate", pipelines=("WanAnimatePipeline",))
