"""Triton: one pass puts tokens in block order and averages blocks, and one corrects them on their way back."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..correct import Correction
from ..layout import TokenLayout

CORRECTED_TILES = 16
"""How many tiles of rows are corrected with one reading of the matrix."""


def order(tokens: Tensor, layout: TokenLayout, average: bool = True) -> tuple[Tensor, Tensor | None]:
    """Read a tensor once, write it once in block order, and average its video blocks on the way.

    Args:
        tokens: `(B, S, H, D)`, any strides.
        layout: the block order.
        average: False leaves the means out.

    Returns:
        The tokens in block order, `(B, S, H, D)` with the memory of `(B, H, S, D)`, where blocks are contiguous; and
        the block means, `(B, H, Nv, D)` float32, or None.
    """
    tokens = tokens if tokens.stride(-1) == 1 else tokens.contiguous()
    batch, seq_len, heads, head_dim = tokens.shape
    ordered = torch.empty(batch, heads, seq_len, head_dim, dtype=tokens.dtype, device=tokens.device)
    num_averaged = layout.num_video_blocks if average else 0
    means = torch.empty(batch, heads, num_averaged, head_dim, dtype=torch.float32, device=tokens.device)
    _order_kernel[(heads, layout.num_blocks, batch)](
        tokens, ordered, means, layout.order, *tokens.stride()[:3], seq_len, heads, num_averaged,
        HEAD_DIM=head_dim, PADDED_DIM=triton.next_power_of_2(head_dim),
        BLOCK=layout.block, PADDED_BLOCK=triton.next_power_of_2(layout.block), num_warps=4,
    )  # fmt: skip
    return ordered.transpose(1, 2), means if average else None


def restore(out: Tensor, layout: TokenLayout, correction: Correction | None = None) -> Tensor:
    """Put a block-ordered `(B, S, H, D)` tensor back in the original order, contiguous; correct the video blocks."""
    batch, seq_len, heads, head_dim = out.shape
    restored = torch.empty(batch, seq_len, heads, head_dim, dtype=out.dtype, device=out.device)
    rows = 64 if correction is None else corrected_rows(out.dtype)
    tiles = triton.cdiv(seq_len, rows)
    some = 1 if correction is None else CORRECTED_TILES
    matrix, offset = (out, out) if correction is None else (correction.matrix, correction.offset)
    _restore_kernel[(heads, triton.cdiv(tiles, some), batch)](
        out, restored, layout.inverse, matrix, offset,
        *out.stride()[:3], seq_len, heads, layout.num_video_blocks * layout.block,
        HEAD_DIM=head_dim, PADDED_DIM=max(16, triton.next_power_of_2(head_dim)), ROWS=rows, TILES=some,
        CORRECT=correction is not None, num_warps=4 if correction is None else 8,
    )  # fmt: skip
    return restored


def corrected_rows(dtype: torch.dtype) -> int:
    """Count the rows that are corrected at once: with the matrix they fit the shared memory of small GPUs."""
    return 32 if dtype == torch.float32 else 64


@triton.jit
def _order_kernel(
    tokens_ptr, ordered_ptr, means_ptr, order_ptr, stride_b, stride_s, stride_h, seq_len, heads, num_averaged,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK: tl.constexpr, PADDED_BLOCK: tl.constexpr,
):  # fmt: skip
    # Heads vary fastest: programs that run together read neighbouring memory of the same tokens.
    head = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)
    in_block = tl.arange(0, PADDED_BLOCK)
    slot = block * BLOCK + in_block
    dims = tl.arange(0, PADDED_DIM)
    rows = (in_block < BLOCK) & (slot < seq_len)
    mask = rows[:, None] & (dims < HEAD_DIM)[None, :]
    token = tl.load(order_ptr + slot, mask=rows, other=0).to(tl.int64)
    source = tokens_ptr + sample * stride_b + head * stride_h + token[:, None] * stride_s + dims[None, :]
    x = tl.load(source, mask=mask, other=0.0)
    row = sample * heads + head
    tl.store(ordered_ptr + (row * seq_len + slot)[:, None] * HEAD_DIM + dims[None, :], x, mask=mask)
    if block < num_averaged:
        mean = tl.sum(x.to(tl.float32), axis=0) / BLOCK
        tl.store(means_ptr + (row * num_averaged + block) * HEAD_DIM + dims, mean, mask=dims < HEAD_DIM)


@triton.jit
def _restore_kernel(
    out_ptr, restored_ptr, inverse_ptr, matrix_ptr, offset_ptr,
    stride_b, stride_s, stride_h, seq_len, heads, video,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, CORRECT: tl.constexpr,
):  # fmt: skip
    """Restore some tiles of rows of one head, whose matrix is read once."""
    head = tl.program_id(0).to(tl.int64)
    sample = tl.program_id(2).to(tl.int64)
    dims = tl.arange(0, PADDED_DIM)
    if CORRECT:
        row = sample * heads + head
        inside = (dims < HEAD_DIM)[:, None] & (dims < HEAD_DIM)[None, :]
        matrix_ptr += (row * HEAD_DIM + dims)[:, None] * HEAD_DIM + dims[None, :]
        matrix = tl.load(matrix_ptr, mask=inside, other=0.0).to(out_ptr.dtype.element_ty)
        offset = tl.load(offset_ptr + row * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0)
    for tile in tl.range(TILES):
        token = (tl.program_id(1) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        mask = (token < seq_len)[:, None] & (dims < HEAD_DIM)[None, :]
        slot = tl.load(inverse_ptr + token, mask=token < seq_len, other=0).to(tl.int64)
        source = out_ptr + sample * stride_b + head * stride_h + slot[:, None] * stride_s + dims[None, :]
        x = tl.load(source, mask=mask, other=0.0)
        if CORRECT:
            change = tl.dot(x, matrix, input_precision="ieee") + offset[None, :]
            corrected = tl.where((slot < video)[:, None], x.to(tl.float32) + change, x.to(tl.float32))
            x = _rounded(corrected, x.dtype)
        to = ((sample * seq_len + token) * heads + head)[:, None] * HEAD_DIM + dims[None, :]
        tl.store(restored_ptr + to, x, mask=mask)


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """Convert; in float16 to its largest number at most."""
    if dtype == tl.float16:
        x = tl.where(x > 65504.0, 65504.0, tl.where(x < -65504.0, -65504.0, x))
    return x.to(dtype)
