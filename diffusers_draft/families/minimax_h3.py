"""MiniMax-H3: joint self-attention over a packed sequence of text, conditions, audio and, at its end, the video."""

from typing import Any

from .family import Family, Inputs, Refusal, VideoTokens
from .locate.coordinates import from_positions


def video(inputs: Inputs, config: Any) -> VideoTokens:
    """Locate the video tokens, at the end of the packed sequence.

    As in diffusers, modular_pipelines/minimax_h3/before_denoise.py.
    """
    return from_positions(inputs["position_ids"])


MINIMAX_H3 = Family(
    name="MiniMax-H3",
    layers=("transformer_blocks.*.attn",),
    processors=("MiniMaxH3AttnProcessor",),
    video=video,
    dense_layers=("transformer_blocks.0.attn",),
    dense_steps=0.25,
    top_timestep=None,
    scheduler_units=False,
    split=Refusal("its packed sequence is as long as the prompt makes it, and ranks could rarely share it equally"),
)
