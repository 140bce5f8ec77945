"""HunyuanVideo 1.5: joint self-attention, image and text tokens behind the video, the valid ones first."""

import math
from typing import Any

import torch

from . import splits
from .family import Family, Inputs, VideoTokens
from .locate.latents import channels_first
from .processors.hunyuan_video15 import attend_with_key_mask


def video(inputs: Inputs, config: Any) -> VideoTokens:
    """Locate the video tokens, of `hidden_states` `(B, C, F, H, W)`, in front of the valid image and text tokens.

    As in diffusers, transformer_hunyuan_video15.py `forward`, which puts valid tokens first. Image tokens are valid if
    any image embedding of the batch is not zero.
    """
    grid = channels_first(inputs, config).grid
    masks = torch.cat([inputs["encoder_attention_mask"], inputs["encoder_attention_mask_2"]], dim=1)
    images = inputs["image_embeds"]
    valid = masks.bool().sum(dim=1, dtype=torch.int32) + images.any().int() * images.shape[1]
    return VideoTokens(grid=grid, kv_len=valid + math.prod(grid))


HUNYUAN_VIDEO15 = Family(
    name="HunyuanVideo 1.5",
    layers=("transformer_blocks.*.attn",),
    processors=("HunyuanVideo15AttnProcessor2_0",),
    explicit=attend_with_key_mask,
    video=video,
    dense_layers=(),
    dense_steps=0.25,
    split=splits.HUNYUAN_VIDEO15,
)
