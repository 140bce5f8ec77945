"""LTX-Video: self-attention over packed latents, with tokens of conditions in front of the video."""

from . import splits
from .family import Family
from .locate.coordinates import from_arguments

LTX = Family(
    name="LTX-Video",
    layers=("transformer_blocks.*.attn1",),
    processors=("LTXVideoAttnProcessor",),
    video=from_arguments,
    dense_layers=("transformer_blocks.0.attn1",),
    dense_steps=0.25,
    split=splits.LTX,
)
