"""Kandinsky 5 and 6: self-attention over video tokens alone; Kandinsky 6 puts a reference frame behind them."""

import itertools
from typing import Any

from torch import Tensor

from .family import Family, Inputs, Refusal, VideoTokens
from .locate.latents import channels_last
from .locate.reading import read_once

NO_SPLIT = Refusal("neither diffusers nor draft attention has a plan that splits its forward yet")


def refuse_nabla(config: Any) -> None:
    """Raise ValueError for a Kandinsky 5 model with NABLA attention, which is block-sparse already."""
    if config.attention_type == "nabla":
        raise ValueError(
            'This Kandinsky 5 transformer has attention_type="nabla", which is block-sparse already and orders its '
            'tokens in another way. Draft attention needs attention_type="regular".'
        )


def without_references(inputs: Inputs, config: Any) -> VideoTokens:
    """Locate the video tokens, of `hidden_states` `(B, F, H, W, C)` without the reference frames at its end.

    As in diffusers, transformer_kandinsky6.py `forward`.
    """
    frames, rows, columns = channels_last(inputs, config).grid
    types = inputs.get("visual_token_type_ids")
    return VideoTokens(grid=(frames - (0 if types is None else _references(types)), rows, columns))


@read_once
def _references(types: Tensor) -> int:
    """Count the frames at the end whose type differs from that of the first frame; types are `(B, F)`."""
    others = (types != types[:, :1]).any(dim=0).tolist()
    return len(list(itertools.takewhile(bool, reversed(others))))


KANDINSKY5 = Family(
    name="Kandinsky 5",
    layers=("visual_transformer_blocks.*.self_attention",),
    processors=("Kandinsky5AttnProcessor",),
    video=channels_last,
    check=refuse_nabla,
    dense_layers=("visual_transformer_blocks.0.self_attention",),
    dense_steps=0.25,
    split=NO_SPLIT,
)

KANDINSKY6 = Family(
    name="Kandinsky 6",
    layers=("visual_transformer_blocks.*.video_dec_block.self_attention",),
    processors=("Kandinsky6AttnProcessor",),
    video=without_references,
    dense_layers=("visual_transformer_blocks.0.video_dec_block.self_attention",),
    dense_steps=0.25,
    split=NO_SPLIT,
)
