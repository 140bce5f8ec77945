"""SkyReels-V2, also with diffusion forcing: self-attention over video tokens alone, as in Wan.

Calls with its causal masks run dense.
"""

from . import splits
from .family import Family
from .locate.latents import channels_first

SKYREELS_V2 = Family(
    name="SkyReels-V2",
    layers=("blocks.*.attn1",),
    processors=("SkyReelsV2AttnProcessor",),
    video=channels_first,
    dense_layers=("blocks.0.attn1",),
    dense_steps=0.25,
    split=splits.SKYREELS_V2,
)
