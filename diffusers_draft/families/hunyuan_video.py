"""HunyuanVideo (and HunyuanCustom, which has the same transformer): joint self-attention, right-padded text last."""

from . import splits
from .family import Family
from .locate.latents import in_front_of_text

HUNYUAN_VIDEO = Family(
    name="HunyuanVideo",
    layers=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    processors=("HunyuanVideoAttnProcessor2_0",),
    video=in_front_of_text,
    dense_timestep=945.0,
    dense_layers=("transformer_blocks.0.attn", "transformer_blocks.1.attn"),
    split=splits.HUNYUAN_VIDEO,
)
