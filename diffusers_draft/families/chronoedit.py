"""ChronoEdit: Wan's layout; the number of frames drops in the middle of a run."""

from . import Family, splits
from .locate.latents import channels_first

CHRONOEDIT = Family(
    name="ChronoEdit",
    pipelines=("ChronoEditPipeline",),
    layers=("blocks.*.attn1",),
    processors=("WanAttnProcessor",),
    video=channels_first,
    dense_layers=("blocks.0.attn1",),
    dense_steps=0.25,
    split=splits.WAN,
    text="cross-attention",
)
