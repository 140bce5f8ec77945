"""LTX-2: self-attention over packed latents, with keyframe and reference tokens behind the video; audio apart."""

from . import splits
from .family import Family
from .locate.coordinates import from_arguments

LTX2 = Family(
    name="LTX-2",
    layers=("transformer_blocks.*.attn1",),
    processors=("LTX2AudioVideoAttnProcessor", "LTX2PerturbedAttnProcessor"),
    video=from_arguments,
    dense_layers=("transformer_blocks.0.attn1",),
    dense_steps=0.25,
    split=splits.LTX2,
)
