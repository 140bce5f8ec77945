"""Kandinsky 5 and 6: video tokens alone; Kandinsky 6 has an audio stream of its own."""

from typing import Any

from . import Family
from .latents import channels_last


def refuse_nabla(config: Any) -> None:
    if config.attention_type == "nabla":
        raise ValueError(
            'This Kandinsky 5 transformer has attention_type="nabla", which is block-sparse already and orders its '
            'tokens in another way. Draft attention needs attention_type="regular".'
        )


KANDINSKY5 = Family(
    name="Kandinsky 5",
    pipelines=("Kandinsky5T2VPipeline", "Kandinsky5I2VPipeline"),
    layers=("visual_transformer_blocks.*.self_attention",),
    processors=("Kandinsky5AttnProcessor",),
    video=channels_last,
    check=refuse_nabla,
    dense_layers=("visual_transformer_blocks.0.self_attention",),
    dense_steps=0.25,
    text="cross-attention",
    notes="not with NABLA attention",
)

KANDINSKY6 = Family(
    name="Kandinsky 6",
    pipelines=("Kandinsky6TI2VAPipeline",),
    layers=("visual_transformer_blocks.*.video_dec_block.self_attention",),
    processors=("Kandinsky6AttnProcessor",),
    video=channels_last,
    dense_layers=("visual_transformer_blocks.0.video_dec_block.self_attention",),
    dense_steps=0.25,
    text="cross-attention; audio apart",
    notes="a reference frame counts as the last frame of the video",
)
