"""The steps around the kernel in Triton, for GPUs: each reads and writes its tensors once and never waits."""

from .ordering import order, restore
from .selection import select

__all__ = ["order", "restore", "select"]
