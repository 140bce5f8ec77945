"""The transformers that draft attention knows: one file of data for each family, one table for all."""

import functools
import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..attention.layout import Grid

Inputs = dict[str, Any]
"""Arguments of one transformer forward, by name."""


@functools.cache
def parameter_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the arguments that the `forward` of a module's class takes, without `self`."""
    return tuple(inspect.signature(forward).parameters)[1:]


def inputs_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
    """What a forward pre-hook gets, by name."""
    return dict(zip(parameter_names(type(module).forward), args, strict=False)) | kwargs


@dataclass(frozen=True, kw_only=True)
class VideoTokens:
    """Where one forward's video tokens lie in the sequence that self-attention sees.

    Attributes:
        grid: `(T, Y, X)` tokens, in raster order.
        prefix: tokens in front of them.
        kv_len: `(B,)` leading valid keys of each sample, on the inputs' device; None where nothing is padded.
    """

    grid: Grid
    prefix: int = 0
    kv_len: Tensor | None = None


def anything(config: Any) -> None:
    """For families of which every configuration can be sparse."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """How the tokens of one forward are split over GPUs (Ulysses).

    Attributes:
        plan: diffusers' context-parallel plan, from the model's config: what is split and gathered at which module.
        whole_text: whether the tokens behind the video in its self-attention stay whole on every rank.
        others: paths of other attention layers whose keys are split, with `*` for the index; diffusers' own exchange
            serves them.
        check: raises ValueError for a model whose config cannot be split.
    """

    plan: Callable[[Any], dict[str, Any]]
    whole_text: bool = False
    others: tuple[str, ...] = ()
    check: Callable[[Any], None] = anything


@dataclass(frozen=True, kw_only=True)
class Family:
    """What differs between transformer classes.

    Attributes:
        name: for people.
        pipelines: diffusers pipelines that use it.
        layers: module paths of the video self-attention layers with `*` for the index, in execution order.
        processors: class names of their stock processors, which must end in `dispatch_attention_fn` or
            `F.scaled_dot_product_attention`.
        explicit: a `__call__` to run instead of theirs, which ends in `dispatch_attention_fn`; it must keep up with
            upstream's, and tests/test_explicit.py watches that.
        stock_when_dense: whether dense forwards run upstream's `__call__` all the same.
        video: finds the video tokens from the inputs of a forward and the model's config.
        check: raises ValueError for a model whose config makes its self-attention something else.
        dense_layers: module paths of the layers that stay dense by default.
        dense_timestep: steps above this timestep stay dense by default.
        dense_steps: share of a run's steps, from its start, that stays dense by default where no timestep is known
            to be best; a transformer without a pipeline does not know its run, and no step of it is dense then.
        scheduler_units: whether the model gets timesteps as its scheduler counts them.
        split: how to split it over GPUs, or the reason why that does not work.
        text: where text and other tokens meet the video, for the table in README.
        notes: what else a user should know, likewise.
    """

    name: str
    pipelines: tuple[str, ...]
    layers: tuple[str, ...]
    processors: tuple[str, ...]
    explicit: Callable[..., Any] | None = None
    stock_when_dense: bool = False
    video: Callable[[Inputs, Any], VideoTokens]
    check: Callable[[Any], None] = anything
    dense_layers: tuple[str, ...]
    dense_timestep: float = math.inf
    dense_steps: float | None = None
    scheduler_units: bool = True
    split: Split | str
    text: str
    notes: str = ""


_TABLE = {
    "WanTransformer3DModel": "wan.WAN",
    "WanVACETransformer3DModel": "wan.WAN_VACE",
    "WanAnimateTransformer3DModel": "wan.WAN_ANIMATE",
    "HunyuanVideoTransformer3DModel": "hunyuan_video.HUNYUAN_VIDEO",
    "HunyuanVideo15Transformer3DModel": "hunyuan_video15.HUNYUAN_VIDEO15",
    "SkyReelsV2Transformer3DModel": "skyreels_v2.SKYREELS_V2",
    "LTXVideoTransformer3DModel": "ltx.LTX",
    "LTX2VideoTransformer3DModel": "ltx2.LTX2",
    "Kandinsky5Transformer3DModel": "kandinsky.KANDINSKY5",
    "Kandinsky6Transformer3DModel": "kandinsky.KANDINSKY6",
    "CosmosTransformer3DModel": "cosmos.COSMOS",
    "CosmosControlNetModel": "cosmos.COSMOS_CONTROL",
    "AnyFlowTransformer3DModel": "anyflow.ANYFLOW",
    "ChronoEditTransformer3DModel": "chronoedit.CHRONOEDIT",
    "MotifVideoTransformer3DModel": "motif_video.MOTIF_VIDEO",
    "HunyuanVideoFramepackTransformer3DModel": "framepack.FRAMEPACK",
    "HeliosTransformer3DModel": "helios.HELIOS",
    "MiniMaxH3Transformer3DModel": "minimax_h3.MINIMAX_H3",
    "CogVideoXTransformer3DModel": "cogvideox.COGVIDEOX",
    "ConsisIDTransformer3DModel": "cogvideox.CONSISID",
    "MochiTransformer3DModel": "mochi.MOCHI",
    "AllegroTransformer3DModel": "allegro.ALLEGRO",
    "EasyAnimateTransformer3DModel": "easyanimate.EASYANIMATE",
}


def families() -> dict[str, Family]:
    """The table: diffusers class name -> family."""
    return {name: _load(place) for name, place in _TABLE.items()}


def family_of(transformer: nn.Module) -> Family | None:
    """The family of a diffusers transformer or of a subclass of one; None if it is not known."""
    for cls in type(transformer).__mro__:
        if cls.__module__.startswith("diffusers.") and cls.__name__ in _TABLE:
            return _load(_TABLE[cls.__name__])
    return None


def _load(place: str) -> Family:
    file, name = place.split(".")
    return getattr(importlib.import_module(f".{file}", __name__), name)
