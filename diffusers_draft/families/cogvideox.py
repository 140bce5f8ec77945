"""CogVideoX 1.0 and 1.5 and ConsisID: text in front of the video tokens."""

import dataclasses
from typing import Any

from . import Family, Inputs, VideoTokens
from .latents import patch_of, patched


def video(inputs: Inputs, config: Any) -> VideoTokens:
    """Text, then tokens of `hidden_states` `(B, F, C, H, W)` (cogvideox_transformer_3d.py `forward`)."""
    frames, _, rows, columns = inputs["hidden_states"].shape[1:]
    grid = patched((frames, rows, columns), patch_of(config))
    return VideoTokens(grid=grid, prefix=inputs["encoder_hidden_states"].shape[1])


COGVIDEOX = Family(
    name="CogVideoX 1.0 and 1.5",
    pipelines=(
        "CogVideoXPipeline",
        "CogVideoXImageToVideoPipeline",
        "CogVideoXVideoToVideoPipeline",
        "CogVideoXFunControlPipeline",
    ),
    layers=("transformer_blocks.*.attn1",),
    processors=("CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0"),
    video=video,
    dense_layers=("transformer_blocks.0.attn1",),
    dense_steps=0.25,
    text="joint, in front",
    notes="fuse its projections before enabling: `fuse_qkv_projections` replaces every processor",
)

CONSISID = dataclasses.replace(COGVIDEOX, name="ConsisID", pipelines=("ConsisIDPipeline",))
