"""HunyuanVideo (and HunyuanCustom, which has the same transformer): video tokens, then right-padded text."""

from typing import Any

import torch
from torch import Tensor

from ..layout import Grid
from . import Family, Inputs


def grid(inputs: Inputs, config: Any) -> Grid:
    """Tokens of `hidden_states` `(B, C, F, H, W)` after patching (transformer_hunyuan_video.py `forward`)."""
    frames, rows, columns = inputs["hidden_states"].shape[2:]
    return frames // config.patch_size_t, rows // config.patch_size, columns // config.patch_size


def kv_len(inputs: Inputs, video_tokens: int) -> Tensor:
    """Video tokens and each sample's valid text, counted as upstream counts them."""
    return inputs["encoder_attention_mask"].sum(dim=1, dtype=torch.int32) + video_tokens


HUNYUAN_VIDEO = Family(
    name="HunyuanVideo",
    pipelines=("HunyuanVideoPipeline", "HunyuanVideoImageToVideoPipeline", "HunyuanSkyreelsImageToVideoPipeline"),
    layers=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    processor="HunyuanVideoAttnProcessor2_0",
    grid=grid,
    kv_len=kv_len,
    dense_timestep=945.0,
    dense_layers=("transformer_blocks.0.attn", "transformer_blocks.1.attn"),
    text="joint, behind the video, padding left out",
)
