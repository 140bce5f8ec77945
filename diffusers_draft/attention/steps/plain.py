"""The steps around the kernel in plain torch, for any device: what `fused` must equal."""

import torch
from torch import Tensor

from ..block_mask import BlockMask
from ..draft import block_means, draft_map
from ..layout import TokenLayout
from ..select import select as select_from_map


def order(tokens: Tensor, layout: TokenLayout, average: bool = True) -> tuple[Tensor, Tensor | None]:
    """Puts `(B, S, H, D)` tokens in block order and averages the video blocks, `(B, H, Nv, D)` float32.

    The memory is that of `(B, H, S, D)`: blocks are contiguous, as the kernels read them.
    """
    batch, seq_len, heads, head_dim = tokens.shape
    sample, head = _counts(batch, layout)[:, None, None], _counts(heads, layout)[:, None]
    rows = (sample * seq_len + layout.order) * heads + head
    ordered = tokens.reshape(-1, head_dim).index_select(0, rows.flatten())
    ordered = ordered.view(batch, heads, seq_len, head_dim).transpose(1, 2)
    if not average:
        return ordered, None
    with torch.no_grad():
        return ordered, block_means(ordered, layout.num_video_blocks, layout.block)


def select(
    query_means: Tensor, key_means: Tensor, scale: float, sparsity: float, budget: str, layout: TokenLayout,
    kv_len: Tensor | None,
) -> BlockMask:  # fmt: skip
    """Chooses the kept pairs from the block means, `(B, H, Nv, D)` float32 each."""
    draft = draft_map(query_means, key_means, scale)
    return select_from_map(draft, sparsity, budget, seq_len=layout.seq_len, block=layout.block, kv_len=kv_len)


def restore(out: Tensor, layout: TokenLayout) -> Tensor:
    """Puts block-ordered `(B, S, H, D)` tokens back in their original order, contiguous."""
    batch, seq_len, heads, head_dim = out.shape
    sample, head = _counts(batch, layout)[:, None, None], _counts(heads, layout)
    rows = (sample * heads + head) * seq_len + layout.inverse[:, None]
    restored = out.transpose(1, 2).reshape(-1, head_dim).index_select(0, rows.flatten())
    return restored.view(batch, seq_len, heads, head_dim)


def _counts(number: int, layout: TokenLayout) -> Tensor:
    return torch.arange(number, device=layout.order.device)
