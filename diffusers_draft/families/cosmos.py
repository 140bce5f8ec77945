"""Cosmos 1, 2 and 2.5 and the control network of Cosmos 2.5 Transfer: self-attention over video tokens alone."""

import dataclasses
from typing import Any

from . import splits
from .family import Family, Inputs, VideoTokens
from .locate.latents import channels_first, latents_shape, patched


def controlled(inputs: Inputs, config: Any) -> VideoTokens:
    """Locate the video tokens, all tokens of `controls_latents` `(B, C, F, H, W)`.

    As in diffusers, controlnet_cosmos.py `forward`.
    """
    sizes = latents_shape(inputs, "B, C, F, H, W", name="controls_latents")[2:]
    return VideoTokens(grid=patched(sizes, config.patch_size))


COSMOS = Family(
    name="Cosmos 1, 2 and 2.5",
    layers=("transformer_blocks.*.attn1",),
    processors=("CosmosAttnProcessor2_0",),
    video=channels_first,
    dense_layers=("transformer_blocks.0.attn1",),
    dense_steps=0.25,
    top_timestep=None,
    scheduler_units=False,
    split=splits.NO_PARALLEL_CONFIG,
)

COSMOS_CONTROL = dataclasses.replace(
    COSMOS,
    name="Cosmos control network",
    layers=("control_blocks.*.attn1",),
    video=controlled,
    dense_layers=("control_blocks.0.attn1",),
)
