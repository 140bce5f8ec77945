"""EasyAnimate: joint self-attention, text of one or two encoders in front of the video tokens."""

from typing import Any

from . import splits
from .family import Family, Inputs, VideoTokens
from .locate.latents import channels_first


def video(inputs: Inputs, config: Any) -> VideoTokens:
    """Locate the video tokens, of `hidden_states` `(B, C, F, H, W)`, behind the texts.

    As in diffusers, transformer_easyanimate.py `forward`.
    """
    texts = [inputs.get(name) for name in ("encoder_hidden_states", "encoder_hidden_states_t5")]
    prefix = sum(text.shape[1] for text in texts if text is not None)
    return VideoTokens(grid=channels_first(inputs, config).grid, prefix=prefix)


EASYANIMATE = Family(
    name="EasyAnimate",
    layers=("transformer_blocks.*.attn1",),
    processors=("EasyAnimateAttnProcessor2_0",),
    video=video,
    dense_layers=("transformer_blocks.0.attn1",),
    dense_steps=0.25,
    split=splits.NO_PARALLEL_CONFIG,
)
