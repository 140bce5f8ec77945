"""Wan 2.1 and 2.2: self-attention holds video tokens alone, text enters by cross-attention."""

import dataclasses

from . import Family
from .latents import channels_first

WAN = Family(
    name="Wan 2.1 and 2.2",
    pipelines=("WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline", "LucyEditPipeline"),
    layers=("blocks.*.attn1",),
    processors=("WanAttnProcessor",),
    video=channels_first,
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
