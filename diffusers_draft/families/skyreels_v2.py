"""SkyReels-V2, also with diffusion forcing: Wan's layout; its causal masks are not honoured sparsely."""

from . import Family, splits
from .locate.latents import channels_first

SKYREELS_V2 = Family(
    name="SkyReels-V2",
    pipelines=(
        "SkyReelsV2Pipeline",
        "SkyReelsV2ImageToVideoPipeline",
        "SkyReelsV2DiffusionForcingPipeline",
        "SkyReelsV2DiffusionForcingImageToVideoPipeline",
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
    ),
    layers=("blocks.*.attn1",),
    processors=("SkyReelsV2AttnProcessor",),
    video=channels_first,
    dense_layers=("blocks.0.attn1",),
    dense_steps=0.25,
    split=splits.SKYREELS_V2,
    text="cross-attention",
    notes="with `num_frame_per_block` above 1 (causal) it runs dense, and the report counts it; under diffusion "
    "forcing the noisiest frame tells the step",
)
