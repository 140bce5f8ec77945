"""Draft attention for diffusers: makes a video transformer's self-attention block-sparse in one line."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import DraftHandle, disable_draft_attention, enable_draft_attention, enable_parallelism
    from .attention import draft_attention
    from .config import DraftConfig

__version__ = "0.2.0"
__all__ = [
    "DraftConfig",
    "DraftHandle",
    "disable_draft_attention",
    "draft_attention",
    "enable_draft_attention",
    "enable_parallelism",
]

_HOMES = {"draft_attention": "attention", "DraftConfig": "config"}
"""Modules of public names; the others are in `api`, which imports diffusers."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES.get(name, 'api')}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
