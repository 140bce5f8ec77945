"""The draft: attention between block means, and the scores that it gives every pair of blocks."""

import torch
from torch import Tensor

SCORES = ("value", "mass")
"""What ranks the pairs of blocks: `value`, or the draft map as it is, the mass that would be lost (the paper)."""


def block_means(tokens: Tensor, num_blocks: int, block: int) -> Tensor:
    """Average the leading blocks of a block-ordered tensor in float32 (paper, section 3.2: average pooling).

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
    """Compute softmax attention between block means, each sample and head on its own.

    Args:
        query_means: `(B, H, Nv, D)` float32.
        key_means: `(B, H, Nv, D)` float32.
        scale: the attention's own scale.

    Returns:
        `(B, H, Nv, Nv)` float32; every row sums to one.
    """
    with torch.autocast(query_means.device.type, enabled=False):
        return torch.softmax(query_means @ key_means.transpose(-1, -2) * scale, dim=-1)


NEAREST = 1e-6
"""The least distance of a block's mean value from the output, relative to the usual one, that float32 tells from
none. Nearer ones count as so far: of a row that looks at one block alone, the output is that block's value."""


def value(draft: Tensor, value_means: Tensor) -> Tensor:
    """Score a pair by what the output would lose: its mass times how far the block's mean value lies from the output.

    Args:
        draft: `(B, H, Nv, Nv)` float32 draft map.
        value_means: `(B, H, Nv, D)` float32.

    Returns:
        `(B, H, Nv, Nv)` float32, not negative.
    """
    with torch.autocast(draft.device.type, enabled=False):
        value_means = value_means - value_means.mean(-2, keepdim=True)  # distances stay, and are not lost in rounding
        far = torch.cdist(draft @ value_means, value_means, compute_mode="donot_use_mm_for_euclid_dist")
        usual = far.square().mean(-1, keepdim=True).sqrt()  # of a row: what is not finite stays in its own
        return draft * far.clamp(min=NEAREST * usual)
