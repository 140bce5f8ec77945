"""Mochi: joint self-attention, valid text behind the video tokens."""

import math
from typing import Any

import torch

from . import splits
from .family import Family, Inputs, VideoTokens
from .locate.latents import channels_first
from .processors.mochi import attend_to_valid_text


def video(inputs: Inputs, config: Any) -> VideoTokens:
    """Locate the video tokens, of `hidden_states` `(B, C, F, H, W)`, in front of each sample's valid text.

    As in diffusers, transformer_mochi.py `forward`.
    """
    grid = channels_first(inputs, config).grid
    text = inputs["encoder_attention_mask"].sum(dim=1, dtype=torch.int32)
    return VideoTokens(grid=grid, kv_len=text + math.prod(grid))


MOCHI = Family(
    name="Mochi",
    layers=("transformer_blocks.*.attn1",),
    processors=("MochiAttnProcessor2_0",),
    explicit=attend_to_valid_text,
    stock_when_dense=True,
    video=video,
    dense_layers=("transformer_blocks.0.attn1",),
    dense_steps=0.25,
    split=splits.NO_PARALLEL_CONFIG,
)
