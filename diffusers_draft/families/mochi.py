"""Mochi: joint self-attention, valid text behind the video tokens."""

from . import splits
from .family import Family
from .locate.latents import in_front_of_text
from .processors.mochi import attend_to_valid_text

MOCHI = Family(
    name="Mochi",
    layers=("transformer_blocks.*.attn1",),
    processors=("MochiAttnProcessor2_0",),
    explicit=attend_to_valid_text,
    stock_when_dense=True,
    video=in_front_of_text,
    dense_layers=("transformer_blocks.0.attn1",),
    dense_steps=0.25,
    top_timestep=None,
    split=splits.NO_PARALLEL_CONFIG,
)
