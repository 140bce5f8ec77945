"""Helios: self-attention over the history and, behind it, the video tokens of a chunk."""

from typing import Any

from .family import Family, Inputs, Refusal, VideoTokens
from .locate.latents import channels_first, history

HISTORY = {"latents_history_short": 1, "latents_history_mid": 2, "latents_history_long": 4}
"""Input with frames in front of the video -> factor on the size of its patches."""


def video(inputs: Inputs, config: Any) -> VideoTokens:
    """Locate the video tokens, of `hidden_states` `(B, C, F, H, W)`, behind the history.

    As in diffusers, transformer_helios.py `forward`.
    """
    prefix = sum(history(inputs, name, config.patch_size, coarseness) for name, coarseness in HISTORY.items())
    return VideoTokens(grid=channels_first(inputs, config).grid, prefix=prefix)


HELIOS = Family(
    name="Helios",
    layers=("blocks.*.attn1",),
    processors=("HeliosAttnProcessor",),
    video=video,
    dense_layers=("blocks.0.attn1",),
    dense_steps=0.25,
    split=Refusal("its layers find the history by its place in the whole sequence, which a share of it does not show"),
)
