"""The steps around the kernel in plain torch, for any device: what `fused` must equal."""

import torch
from torch import Tensor

from .block_mask import BlockMask
from .draft import block_means, draft_map
from .layout import TokenLayout
from .select import select as select_from_map


def order(tokens: Tensor, layout: TokenLayout, average: bool = True) -> tuple[Tensor, Tensor | None]:
    """Puts `(B, S, H, D)` tokens in block order and averages the video blocks, `(B, H, Nv, D)` float32."""
    ordered = tokens.index_select(1, layout.order)
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
    return out.index_select(1, layout.inverse).contiguous()
