"""From the draft map to the block pairs that are kept: one function per budget, then one list per query block."""

from collections.abc import Callable

import torch
from torch import Tensor

from .block_mask import BlockMask

OWN_BLOCK = float("inf")
"""A score above every other: a query block always keeps its own block."""


def pairs_of_head(num_video: int, sparsity: float) -> int:
    """Count the pairs of a head's map that the head budget keeps: never fewer than every block's own."""
    return max(num_video, round((1 - sparsity) * num_video * num_video))


def blocks_of_row(num_video: int, sparsity: float) -> int:
    """Count the key blocks that the row budget keeps for a query block: never fewer than its own."""
    return max(1, round((1 - sparsity) * num_video))


def skips_pairs(num_video: int, sparsity: float, budget: str) -> bool:
    """Return True if a budget leaves out any pair of video blocks."""
    if budget == "head":
        return pairs_of_head(num_video, sparsity) < num_video * num_video
    return num_video > 0 and blocks_of_row(num_video, sparsity) < num_video


def head_budget(scores: Tensor, sparsity: float) -> Tensor:
    """Keep the largest `pairs_of_head` pairs of each head's whole map (the paper).

    Args:
        scores: `(B, H, Nv, Nv)` float32.
        sparsity: share of the pairs to skip.

    Returns:
        `(B, H, P)` int64 kept pairs `row * Nv + column`, ascending.
    """
    count = pairs_of_head(scores.shape[-1], sparsity)
    return scores.flatten(2).topk(count, sorted=False).indices.sort().values


def row_budget(scores: Tensor, sparsity: float) -> Tensor:
    """Keep the `blocks_of_row` largest key blocks of every query block.

    Args:
        scores: `(B, H, Nv, Nv)` float32.
        sparsity: share of the pairs to skip.

    Returns:
        `(B, H, P)` int64 kept pairs `row * Nv + column`, ascending.
    """
    n = scores.shape[-1]
    columns = scores.topk(blocks_of_row(n, sparsity), sorted=False).indices.sort().values
    rows = torch.arange(n, device=scores.device)[:, None]
    return (rows * n + columns).flatten(2)


BUDGETS: dict[str, Callable[[Tensor, float], Tensor]] = {"head": head_budget, "row": row_budget}


def select(
    scores: Tensor, sparsity: float, budget: str, *, seq_len: int, block: int, kv_len: Tensor | None = None
) -> BlockMask:
    """Choose the kept block pairs: video pairs by their score, all pairs with an anchor block.

    Args:
        scores: `(B, H, Nv, Nv)` float32, the largest are kept, NaN last; what is not finite, and the diagonal, is
            overwritten.
        sparsity: share of the video pairs to skip, in [0, 1).
        budget: a key of `BUDGETS`.
        seq_len: tokens in the sequence, video first.
        block: tokens per block.
        kv_len: `(B,)` leading valid keys, at least the video tokens and the prefix; None if all are valid.
    """
    batch, heads, num_video, _ = scores.shape
    num_blocks = -(-seq_len // block)
    num_anchors = num_blocks - num_video
    device = scores.device

    kv_indices = torch.zeros(batch, heads, num_blocks, num_blocks, dtype=torch.int32, device=device)
    kv_indices[:, :, num_video:] = torch.arange(num_blocks, dtype=torch.int32, device=device)
    kv_num_blocks = torch.full((batch, heads, num_blocks), num_blocks, dtype=torch.int32, device=device)
    if num_video:
        scores.nan_to_num_(nan=torch.finfo(scores.dtype).min)  # of NaN and inf, none ranks above the own block
        scores.diagonal(dim1=-2, dim2=-1).fill_(OWN_BLOCK)
        kept = BUDGETS[budget](scores, sparsity)
        counts = _fill_rows(kv_indices, kept, num_video)
        anchors = torch.arange(num_anchors, device=device)
        kv_indices[:, :, :num_video].scatter_(
            -1, counts[..., None] + anchors, (num_video + anchors).int().expand(batch, heads, num_video, -1)
        )
        kv_num_blocks[:, :, :num_video] = counts + num_anchors
    if kv_len is not None:
        kv_len = kv_len.to(device=device, dtype=torch.int32)
        # Blocks of padding are the last ones of every list, so leaving them out only shortens the lists.
        kv_num_blocks -= (num_blocks - (kv_len + block - 1) // block)[:, None, None]
    return BlockMask(kv_num_blocks, kv_indices, kv_len, seq_len, block, num_video)


def _fill_rows(kv_indices: Tensor, kept: Tensor, num_video: int) -> Tensor:
    """Write the kept pairs to the front of their rows; return the `(B, H, Nv)` int64 number in each row."""
    batch, heads, _ = kept.shape
    rows, columns = kept // num_video, kept % num_video
    counts = torch.zeros(batch, heads, num_video, dtype=torch.int64, device=kept.device)
    counts.scatter_add_(2, rows, torch.ones_like(rows))
    row_start = counts.cumsum(2) - counts
    slot = torch.arange(kept.shape[2], device=kept.device) - row_start.gather(2, rows)
    kv_indices.view(batch, heads, -1).scatter_(2, rows * kv_indices.shape[-1] + slot, columns.int())
    return counts
