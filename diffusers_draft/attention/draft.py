"""The draft: attention between block means, the low-resolution map that guides the selection."""

import torch
from torch import Tensor


def block_means(tokens: Tensor, num_blocks: int, block: int) -> Tensor:
    """Averages the leading blocks of a block-ordered tensor in float32 (paper, section 3.2: average pooling).

    Args:
        tokens: `(B, S, H, D)` in block order.
        num_blocks: how many full blocks to average.
        block: tokens per block.

    Returns:
        `(B, H, num_blocks, D)` float32.
    """
    blocks = tokens[:, : num_blocks * block].unflatten(1, (num_blocks, block))
    return blocks.mean(dim=2, dtype=torch.float32).transpose(1, 2)


def draft_map(query_means: Tensor, key_means: Tensor, scale: float) -> Tensor:
    """Softmax attention between block means, each sample and head on its own.

    Args:
        query_means: `(B, H, Nv, D)` float32.
        key_means: `(B, H, Nv, D)` float32.
        scale: the attention's own scale.

    Returns:
        `(B, H, Nv, Nv)` float32; every row sums to one.
    """
    with torch.autocast(query_means.device.type, enabled=False):
        return torch.softmax(query_means @ key_means.transpose(-1, -2) * scale, dim=-1)
