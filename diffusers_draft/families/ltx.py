"""LTX-Video: packed latents, tokens of conditions in front of the video."""

from . import Family, splits
from .locate.coordinates import from_arguments

LTX = Family(
    name="LTX-Video",
    pipelines=("LTXPipeline", "LTXImageToVideoPipeline", "LTXConditionPipeline", "LTXI2VLongMultiPromptPipeline"),
    layers=("transformer_blocks.*.attn1",),
    processors=("LTXVideoAttnProcessor",),
    video=from_arguments,
    dense_layers=("transformer_blocks.0.attn1",),
    dense_steps=0.25,
    split=splits.LTX,
    text="cross-attention; tokens of conditions in front",
    notes="`LTXI2VLongMultiPromptPipeline` makes new coordinates in every step; reading them waits for the GPU",
)
