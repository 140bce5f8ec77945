"""The steps around the kernel in Triton, for GPUs: each reads and writes its tensors once and never waits."""

from .order import order, restore
from .select import select

__all__ = ["order", "restore", "select"]
