"""The steps around the kernel in Triton, for GPUs: each reads and writes its tensors once and never waits."""

from .fused_fit import correct
from .fused_order import order, restore
from .fused_select import select

__all__ = ["correct", "order", "restore", "select"]
