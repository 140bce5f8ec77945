"""Draft attention for diffusers: makes a video transformer's self-attention block-sparse in one line."""

from .attention import draft_attention
from .config import DraftConfig

__version__ = "0.1.0"
__all__ = ["DraftConfig", "draft_attention"]
