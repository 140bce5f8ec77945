"""ChronoEdit: self-attention over video tokens alone, as in Wan; the number of frames drops in the middle of a run."""

from . import splits
from .family import Family
from .locate.latents import channels_first

CHRONOEDIT = Family(
    name="ChronoEdit",
    layers=("blocks.*.attn1",),
    processors=("WanAttnProcessor",),
    video=channels_first,
    dense_layers=("blocks.0.attn1",),
    dense_steps=0.25,
    split=splits.WAN,
)
