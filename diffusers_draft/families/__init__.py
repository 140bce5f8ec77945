"""Supported transformer families: one data file each, and the table that finds them by class name."""

import importlib

from torch import nn

from .family import Family

__all__ = ["families", "family_of"]

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
"""diffusers class name -> file and name of its family."""


def families() -> dict[str, Family]:
    """Load all families, by the class name of their transformer in diffusers."""
    return {name: _load(place) for name, place in _TABLE.items()}


def family_of(transformer: nn.Module) -> Family | None:
    """Find the family of a diffusers transformer or of a subclass of one; return None if it is not supported."""
    for cls in type(transformer).__mro__:
        if cls.__module__.startswith("diffusers.") and cls.__name__ in _TABLE:
            return _load(_TABLE[cls.__name__])
    return None


def _load(place: str) -> Family:
    file, name = place.split(".")
    return getattr(importlib.import_module(f".{file}", __name__), name)
