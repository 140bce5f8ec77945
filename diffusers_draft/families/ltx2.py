"""LTX-2: packed latents, keyframe and reference tokens behind the video, an audio stream of its own."""

from . import Family, splits
from .locate.coordinates import from_arguments

LTX2 = Family(
    name="LTX-2",
    pipelines=(
        "LTX2Pipeline",
        "LTX2ImageToVideoPipeline",
        "LTX2ConditionPipeline",
        "LTX2InContextPipeline",
        "LTX2HDRPipeline",
        "LTX2DFRPipeline",
        "LTX2DFRTemporalRefinePipeline",
    ),
    layers=("transformer_blocks.*.attn1",),
    processors=("LTX2AudioVideoAttnProcessor", "LTX2PerturbedAttnProcessor"),
    video=from_arguments,
    dense_layers=("transformer_blocks.0.attn1",),
    dense_steps=0.25,
    split=splits.LTX2,
    text="cross-attention; keyframe and reference tokens behind, audio apart",
    notes="calls with a mask over pairs of tokens (conditions of a strength below 1) run dense and are counted",
)
