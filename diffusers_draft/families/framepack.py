"""FramePack: joint self-attention over history, video, image tokens and right-padded text."""

import math
from typing import Any

import torch

from .family import Family, Inputs, Refusal, VideoTokens
from .locate.latents import channels_first, history

HISTORY = {"latents_clean": 1, "latents_history_2x": 2, "latents_history_4x": 4}
"""Input with frames in front of the video -> factor on the size of its patches."""


def video(inputs: Inputs, config: Any) -> VideoTokens:
    """Locate the video tokens, of `hidden_states` `(B, C, F, H, W)`, behind the history; images and text follow.

    As in diffusers, transformer_hunyuan_video_framepack.py `forward`.
    """
    grid = channels_first(inputs, config).grid
    prefix = sum(history(inputs, name, (1, 2, 2), coarseness) for name, coarseness in HISTORY.items())
    images_end = prefix + math.prod(grid) + inputs["image_embeds"].shape[1]
    text = inputs["encoder_attention_mask"].sum(dim=1, dtype=torch.int32)
    return VideoTokens(grid=grid, prefix=prefix, kv_len=text + images_end)


FRAMEPACK = Family(
    name="FramePack",
    layers=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    processors=("HunyuanVideoAttnProcessor2_0",),
    video=video,
    dense_layers=("transformer_blocks.0.attn",),
    dense_steps=0.25,
    split=Refusal("its coarse history has a length of its own, and ranks could rarely share it and the video equally"),
)
