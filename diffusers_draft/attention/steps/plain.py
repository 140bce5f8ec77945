"""The steps around the kernel in plain torch, for any device: what `fused` must equal."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..block_mask import BlockMask
from ..correct import Correction, fit
from ..draft import block_means, draft_map, value
from ..layout import TokenLayout
from ..select import select as select_from_scores


def order(tokens: Tensor, layout: TokenLayout, average: bool = True) -> tuple[Tensor, Tensor | None]:
    """Put `(B, S, H, D)` tokens in block order and average the video blocks, `(B, H, Nv, D)` float32.

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
    query_means: Tensor,
    key_means: Tensor,
    value_means: Tensor | None,
    scale: float,
    sparsity: float,
    budget: str,
    layout: TokenLayout,
    kv_len: Tensor | None,
) -> BlockMask:
    """Choose the kept pairs from the block means, `(B, H, Nv, D)` float32 each; by mass alone without value means."""
    scores = draft_map(query_means, key_means, scale)
    if value_means is not None:
        scores = value(scores, value_means)
    return select_from_scores(scores, sparsity, budget, seq_len=layout.seq_len, block=layout.block, kv_len=kv_len)


def attend_to_valid(query: Tensor, key: Tensor, value: Tensor, kv_len: Tensor | None, scale: float | None) -> Tensor:
    """Attend densely to the valid keys of each sample.

    Args:
        query: `(B, n, H, D)`, any rows.
        key: `(B, S, H, D)`, valid ones first.
        value: as `key`.
        kv_len: `(B,)` leading valid keys or None.
        scale: factor on the scores, `D ** -0.5` by default.

    Returns:
        `(B, n, H, D)`.
    """
    lengths = [key.shape[1]] * len(key) if kv_len is None else kv_len.tolist()
    outs = []
    for sample, length in enumerate(lengths):
        q, k, v = query[sample], key[sample, :length], value[sample, :length]
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        outs.append(scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2))
    return torch.cat(outs)


def correct(
    out: Tensor, rows: Tensor, query: Tensor, key: Tensor, value: Tensor, kv_len: Tensor | None, scale: float
) -> Correction:
    """Attend exactly with some rows, and fit the correction to them.

    Args:
        out: `(B, S, H, D)` sparse output in block order.
        rows: `(n,)` int64 rows of it.
        query: as `out`.
        key: as `out`.
        value: as `out`.
        kv_len: `(B,)` leading valid keys or None.
        scale: factor on the scores.
    """
    return fit(out[:, rows], attend_to_valid(query[:, rows], key, value, kv_len, scale))


def restore(out: Tensor, layout: TokenLayout, correction: Correction | None = None) -> Tensor:
    """Put block-ordered `(B, S, H, D)` tokens back in their original order, contiguous; correct the video blocks."""
    batch, seq_len, heads, head_dim = out.shape
    if correction is not None:
        out = _corrected(out, layout, correction)
    sample, head = _counts(batch, layout)[:, None, None], _counts(heads, layout)
    rows = (sample * heads + head) * seq_len + layout.inverse[:, None]
    restored = out.transpose(1, 2).reshape(-1, head_dim).index_select(0, rows.flatten())
    return restored.view(batch, seq_len, heads, head_dim)


def _corrected(out: Tensor, layout: TokenLayout, correction: Correction) -> Tensor:
    by_head = out.transpose(1, 2)
    video = layout.num_video_blocks * layout.block
    rows = by_head[:, :, :video].to(correction.matrix.dtype)
    rows = rows + rows @ correction.matrix + correction.offset[:, :, None]
    if out.dtype == torch.float16:  # the others reach as far as the sum
        largest = torch.finfo(out.dtype).max
        rows = rows.clamp(-largest, largest)
    return torch.cat([rows.to(out.dtype), by_head[:, :, video:]], dim=2).transpose(1, 2)


def _counts(number: int, layout: TokenLayout) -> Tensor:
    return torch.arange(number, device=layout.order.device)
