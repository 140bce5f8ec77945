"""Triton: attention of a few rows to all keys, which many thread blocks share."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

KEYS = 64
"""Keys in one step of the loop."""
WAVES = 2
"""Thread blocks for each processor of the GPU."""


def exact_parts(
    query: Tensor, key: Tensor, value: Tensor, kv_len: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend densely to the valid keys of each sample, as `plain.attend_to_valid` does, to each part of them apart.

    A row left to a single thread block would take as long as dense attention of its whole tile: the keys are split
    among thread blocks, and their results are merged by log-sum-exp.

    Returns:
        The output over each part, `(P, B, H, n, D)` float32, and the log-sum-exp of the scores in it,
        `(P, B, H, n)` float32, -inf where it has no valid keys.
    """
    batch, seq_len, heads, head_dim = key.shape
    rows = query.shape[1]
    padded_rows = max(16, triton.next_power_of_2(min(rows, 64)))
    tiles = triton.cdiv(rows, padded_rows)
    splits = _splits(key, batch * heads * tiles)
    size = triton.cdiv(triton.cdiv(seq_len, splits), KEYS) * KEYS
    parts = torch.empty(splits, batch, heads, rows, head_dim, dtype=torch.float32, device=key.device)
    lse = torch.empty(splits, batch, heads, rows, dtype=torch.float32, device=key.device)
    lengths = None if kv_len is None else kv_len.to(device=key.device, dtype=torch.int32, non_blocking=True)
    _exact_kernel[(splits, heads * tiles, batch)](
        query, key, value, parts, lse, query if lengths is None else lengths,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        seq_len, heads, rows, batch, size, scale / math.log(2),
        HEAD_DIM=head_dim, PADDED_DIM=max(16, triton.next_power_of_2(head_dim)), ROWS=padded_rows, KEYS=KEYS,
        HAS_LEN=lengths is not None, num_warps=4, num_stages=3 if key.element_size() == 2 else 1,
    )  # fmt: skip
    return parts, lse


def merged(parts: Tensor, lse: Tensor) -> Tensor:
    """Merge what `exact_parts` returns: `(B, n, H, D)` float32."""
    return torch.einsum("pbhn,pbhnd->bnhd", torch.softmax(lse, dim=0), parts)


def _splits(key: Tensor, programs: int) -> int:
    """How many parts of the keys fill the GPU."""
    most = triton.cdiv(key.shape[1], KEYS)
    if not key.is_cuda:
        return min(most, 3)
    processors = torch.cuda.get_device_properties(key.device).multi_processor_count
    return max(1, min(most, WAVES * processors // programs))


@triton.jit
def _exact_kernel(
    q_ptr, k_ptr, v_ptr, parts_ptr, lse_ptr, kv_len_ptr,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h, v_stride_b, v_stride_s, v_stride_h,
    seq_len, heads, rows, batch, size, scale,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, HAS_LEN: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    head = (tl.program_id(1) % heads).to(tl.int64)
    sample = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) // heads * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, PADDED_DIM)
    end = seq_len
    if HAS_LEN:
        end = tl.load(kv_len_ptr + sample)
    begin = split * size
    end = tl.minimum(end, begin + size)
    q = tl.load(
        q_ptr + sample * q_stride_b + head * q_stride_h + row[:, None].to(tl.int64) * q_stride_s + dims[None, :],
        mask=(row < rows)[:, None] & (dims < HEAD_DIM)[None, :], other=0.0,
    )  # fmt: skip
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    for start in tl.range(begin, end, KEYS):
        column = (start + tl.arange(0, KEYS)).to(tl.int64)
        valid = (column < end)[:, None] & (dims < HEAD_DIM)[None, :]
        k_from = k_ptr + sample * k_stride_b + head * k_stride_h + column[:, None] * k_stride_s + dims[None, :]
        v_from = v_ptr + sample * v_stride_b + head * v_stride_h + column[:, None] * v_stride_s + dims[None, :]
        k = tl.load(k_from, mask=valid, other=0.0)
        scores = tl.dot(q, k.T, input_precision="tf32x3") * scale
        scores = tl.where((column < end)[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.math.exp2(scores - new_peak[:, None])
        shrink = tl.math.exp2(peak - new_peak)
        v = tl.load(v_from, mask=valid, other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="tf32x3")
        total = total * shrink + tl.sum(weights, 1)
        peak = new_peak
    # A part without valid keys counts for nothing.
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    lse = tl.where(total > 0, (peak + tl.math.log2(total)) * 0.6931471805599453, float("-inf"))
    at = ((split * batch + sample) * heads + head) * rows + row
    tl.store(lse_ptr + at, lse, mask=row < rows)
    to = parts_ptr + at[:, None] * HEAD_DIM + dims[None, :]
    tl.store(to, out, mask=(row < rows)[:, None] & (dims < HEAD_DIM)[None, :])
