"""Attention mass of the true attention, by pairs of blocks."""

import torch
from torch import Tensor
from torch.nn.functional import pad

CHUNK_ELEMENTS = 1 << 26
"""Largest number of attention weights held at once."""


def block_mass(query: Tensor, key: Tensor, num_rows: int, block: int, scale: float, kv_len: Tensor | None) -> Tensor:
    """Sum the softmax weights of the leading query blocks over every key block, a few query blocks at a time.

    Args:
        query: `(B, S, H, D)` in block order.
        key: as `query`.
        num_rows: number of query blocks, all of them full.
        block: tokens per block.
        scale: factor on the scores.
        kv_len: `(B,)` leading valid keys or None.

    Returns:
        `(B, H, num_rows, N)` float32: share of a query block's attention that each key block gets; rows sum to 1.
    """
    batch, seq_len, heads, _ = query.shape
    query, key = query.transpose(1, 2), key.transpose(1, 2).float()
    num_blocks = -(-seq_len // block)
    at_once = max(1, CHUNK_ELEMENTS // (batch * heads * block * seq_len))
    chunks = []
    for start in range(0, num_rows, at_once):
        rows = min(at_once, num_rows - start)
        scores = query[:, :, start * block : (start + rows) * block].float() @ key.transpose(-1, -2) * scale
        if kv_len is not None:
            valid = torch.arange(seq_len, device=key.device) < kv_len.to(key.device)[:, None]
            scores = scores.masked_fill(~valid[:, None, None], float("-inf"))
        weights = pad(scores.softmax(-1), (0, num_blocks * block - seq_len))
        chunks.append(weights.view(batch, heads, rows, block, num_blocks, block).sum(-1).mean(3))
    return torch.cat(chunks, dim=2) if chunks else query.new_zeros(batch, heads, 0, num_blocks, dtype=torch.float32)
