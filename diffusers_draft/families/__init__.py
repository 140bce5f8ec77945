"""The transformers that draft attention knows: one file of data for each family, one table for all."""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from ..layout import Grid

Inputs = dict[str, Any]
"""Arguments of one transformer forward, by name."""


class GridOf(Protocol):
    def __call__(self, inputs: Inputs, config: Any) -> Grid: ...


class KvLenOf(Protocol):
    def __call__(self, inputs: Inputs, video_tokens: int) -> Tensor | None: ...


def every_key(inputs: Inputs, video_tokens: int) -> None:
    """For families whose self-attention holds no padding."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What differs between transformer classes.

    Attributes:
        name: for people.
        pipelines: diffusers pipelines that use it.
        layers: module paths of the video self-attention layers with `*` for the index, in execution order.
        processor: class name of their stock processor, which must end in `dispatch_attention_fn`.
        grid: reads `(T, Y, X)` tokens from the inputs of a forward and the model's config.
        kv_len: reads the `(B,)` valid key lengths from them, on their device, or returns None.
        prefix: tokens in front of the video tokens.
        dense_timestep: steps above this timestep stay dense by default.
        dense_layers: module paths of the layers that stay dense by default.
        text: where text meets the video, for the table in README.
    """

    name: str
    pipelines: tuple[str, ...]
    layers: tuple[str, ...]
    processor: str
    grid: GridOf
    kv_len: KvLenOf = every_key
    prefix: int = 0
    dense_timestep: float
    dense_layers: tuple[str, ...]
    text: str


def families() -> dict[str, Family]:
    """The table: diffusers class name -> family."""
    from .hunyuan_video import HUNYUAN_VIDEO
    from .wan import WAN, WAN_ANIMATE, WAN_VACE

    return {
        "WanTransformer3DModel": WAN,
        "WanVACETransformer3DModel": WAN_VACE,
        "WanAnimateTransformer3DModel": WAN_ANIMATE,
        "HunyuanVideoTransformer3DModel": HUNYUAN_VIDEO,
    }


def family_of(transformer: nn.Module) -> Family | None:
    """The family of a diffusers transformer or of a subclass of one; None if it is not known."""
    table = families()
    for cls in type(transformer).__mro__:
        if cls.__module__.startswith("diffusers.") and cls.__name__ in table:
            return table[cls.__name__]
    return None
