"""Allegro: video tokens alone."""

from . import Family
from .latents import channels_first

ALLEGRO = Family(
    name="Allegro",
    pipelines=("AllegroPipeline",),
    layers=("transformer_blocks.*.attn1",),
    processors=("AllegroAttnProcessor2_0",),
    video=channels_first,
    dense_layers=("transformer_blocks.0.attn1",),
    dense_steps=0.25,
    split="its attention processors take no parallel config, so that they cannot be told of a split",
    text="cross-attention",
)
