"""The method: draft attention on torch alone."""

from .functional import draft_attention

__all__ = ["draft_attention"]
