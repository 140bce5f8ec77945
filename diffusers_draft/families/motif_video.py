"""Motif-Video: video tokens, then image tokens and right-padded text; its decoder attends to a second video."""

import math
from typing import Any

import torch

from . import Family, Inputs, VideoTokens
from .latents import patch_of, patched


def video(inputs: Inputs, config: Any) -> VideoTokens:
    """Tokens of `hidden_states` `(B, C, F, H, W)`, images, valid text (transformer_motif_video.py `forward`)."""
    grid = patched(inputs["hidden_states"].shape[2:], patch_of(config))
    mask, images = inputs.get("encoder_attention_mask"), inputs.get("image_embeds")
    if mask is None:
        return VideoTokens(grid=grid)
    in_front = math.prod(grid) + (0 if images is None else images.shape[1])
    return VideoTokens(grid=grid, kv_len=mask.sum(dim=1, dtype=torch.int32) + in_front)


MOTIF_VIDEO = Family(
    name="Motif-Video",
    pipelines=("MotifVideoPipeline", "MotifVideoImage2VideoPipeline"),
    layers=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    processors=("MotifVideoAttnProcessor2_0",),
    video=video,
    dense_layers=("transformer_blocks.0.attn",),
    dense_steps=0.25,
    text="joint, behind the video, padding left out",
    notes="the decoder's layers see the encoder's video behind their own, and it stays exact",
)
