"""HunyuanVideo (and HunyuanCustom, which has the same transformer): joint self-attention, right-padded text last."""

import math
from typing import Any

import torch

from . import splits
from .family import Family, Inputs, VideoTokens
from .locate.latents import channels_first


def video(inputs: Inputs, config: Any) -> VideoTokens:
    """Locate the video tokens, of `hidden_states` `(B, C, F, H, W)`, in front of each sample's valid text.

    As in diffusers, transformer_hunyuan_video.py `forward`.
    """
    grid = channels_first(inputs, config).grid
    text = inputs["encoder_attention_mask"].sum(dim=1, dtype=torch.int32)
    return VideoTokens(grid=grid, kv_len=text + math.prod(grid))


HUNYUAN_VIDEO = Family(
    name="HunyuanVideo",
    layers=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    processors=("HunyuanVideoAttnProcessor2_0",),
    video=video,
    dense_timestep=945.0,
    dense_layers=("transformer_blocks.0.attn", "transformer_blocks.1.attn"),
    split=splits.HUNYUAN_VIDEO,
)
