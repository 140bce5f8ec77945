"""Motif-Video: joint self-attention, image tokens and text last; the decoder attends to the encoder's video too."""

import math
from typing import Any

from .family import Family, Inputs, Refusal, VideoTokens
from .locate.latents import channels_first
from .locate.padding import lengths_of


def video(inputs: Inputs, config: Any) -> VideoTokens:
    """Locate the video tokens, of `hidden_states` `(B, C, F, H, W)`, in front of image tokens and valid text.

    As in diffusers, transformer_motif_video.py `forward`.
    """
    grid = channels_first(inputs, config).grid
    mask, images = inputs.get("encoder_attention_mask"), inputs.get("image_embeds")
    text = None if mask is None else lengths_of(mask)
    if text is None:
        return VideoTokens(grid=grid)
    in_front = math.prod(grid) + (0 if images is None else images.shape[1])
    return VideoTokens(grid=grid, kv_len=text + in_front)


MOTIF_VIDEO = Family(
    name="Motif-Video",
    layers=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    processors=("MotifVideoAttnProcessor2_0",),
    video=video,
    dense_layers=("transformer_blocks.0.attn",),
    dense_steps=0.25,
    split=Refusal("its decoder attends to a second video, which would have to be exchanged as well"),
)
