"""CogVideoX 1.0 and 1.5 and ConsisID: joint self-attention, text in front of the video tokens."""

import dataclasses
from typing import Any

from . import splits
from .family import Family, Inputs, VideoTokens
from .locate.latents import frames_first


def video(inputs: Inputs, config: Any) -> VideoTokens:
    """Locate the video tokens, of `hidden_states` `(B, F, C, H, W)`, behind the text.

    As in diffusers, cogvideox_transformer_3d.py `forward`.
    """
    return VideoTokens(grid=frames_first(inputs, config).grid, prefix=inputs["encoder_hidden_states"].shape[1])


COGVIDEOX = Family(
    name="CogVideoX 1.0 and 1.5",
    layers=("transformer_blocks.*.attn1",),
    processors=("CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0"),
    video=video,
    dense_layers=("transformer_blocks.0.attn1",),
    dense_steps=0.25,
    split=splits.NO_PARALLEL_CONFIG,
)

CONSISID = dataclasses.replace(
    COGVIDEOX,
    name="ConsisID",
    processors=("CogVideoXAttnProcessor2_0",),
)
