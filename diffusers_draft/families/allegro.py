"""Allegro: video tokens alone."""

from typing import Any

from . import Family, Inputs, VideoTokens
from .latents import patch_of, patched


def video(inputs: Inputs, config: Any) -> VideoTokens:
    """Tokens of `hidden_states` `(B, C, F, H, W)` (transformer_allegro.py `forward`)."""
    return VideoTokens(grid=patched(inputs["hidden_states"].shape[2:], patch_of(config)))


ALLEGRO = Family(
    name="Allegro",
    pipelines=("AllegroPipeline",),
    layers=("transformer_blocks.*.attn1",),
    processors=("AllegroAttnProcessor2_0",),
    video=video,
    dense_layers=("transformer_blocks.0.attn1",),
    dense_steps=0.25,
    text="cross-attention",
)
