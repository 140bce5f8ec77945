"""Draft attention for diffusers: makes a video transformer's self-attention block-sparse in one line."""

from .api import DraftHandle, disable_draft_attention, enable_draft_attention
from .attention.call import draft_attention
from .config import DraftConfig

__version__ = "0.1.0"
__all__ = ["DraftConfig", "DraftHandle", "disable_draft_attention", "draft_attention", "enable_draft_attention"]
