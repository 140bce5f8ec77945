"""Allegro: self-attention over video tokens alone."""

from . import splits
from .family import Family
from .locate.latents import channels_first

ALLEGRO = Family(
    name="Allegro",
    layers=("transformer_blocks.*.attn1",),
    processors=("AllegroAttnProcessor2_0",),
    video=channels_first,
    dense_layers=("transformer_blocks.0.attn1",),
    dense_steps=0.25,
    split=splits.NO_PARALLEL_CONFIG,
)
