"""The steps around the kernel: plain torch for any device, fused in Triton for GPUs."""

from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from ..block_mask import BlockMask
from ..correct import Correction
from ..layout import TokenLayout
from . import plain


class Steps(Protocol):
    """What an implementation of the steps has; `plain` says what each does, and is what every other must equal."""

    def order(self, tokens: Tensor, layout: TokenLayout, average: bool = True) -> tuple[Tensor, Tensor | None]: ...

    def select(
        self,
        query_means: Tensor,
        key_means: Tensor,
        value_means: Tensor | None,
        scale: float,
        sparsity: float,
        budget: str,
        layout: TokenLayout,
        kv_len: Tensor | None,
    ) -> BlockMask: ...

    def correct(
        self,
        out: Tensor,
        rows: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_len: Tensor | None,
        scale: float,
    ) -> Correction: ...

    def restore(self, out: Tensor, layout: TokenLayout, correction: Correction | None = None) -> Tensor: ...


MOST_DIMS = 128
"""Largest head_dim whose tiles fit the shared memory of every GPU that the fused steps run on."""


def steps_for(device: torch.device, dtype: torch.dtype, head_dim: int, differentiable: bool) -> Steps:
    """Choose the steps: fused on GPUs; plain elsewhere, in float64, for larger heads and for gradients."""
    fits = device.type == "cuda" and dtype != torch.float64 and head_dim <= MOST_DIMS
    if differentiable or not fits or not find_spec("triton"):
        return plain
    from . import fused

    return fused
