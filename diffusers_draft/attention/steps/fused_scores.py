"""Triton: from block means to the scores of all pairs of blocks, as logarithms."""

import torch
import triton
import triton.language as tl
from torch import Tensor

NEAREST = 1e-7
"""The least distance of a block's mean value from the output, relative to the largest possible, that still counts."""


def block_scores(queries: Tensor, keys: Tensor, values: Tensor | None = None, *, scale: float) -> Tensor:
    """Compute `(maps, n, n rounded up to 16)` scores, -inf behind column n: aligned rows are read 16 bytes at a time.

    By mass they are those of the draft; by value they are at most 0 and need no normalisation.
    """
    maps, n, head_dim = queries.shape
    stride = triton.cdiv(n, 16) * 16
    scores = torch.empty(maps, n, stride, dtype=torch.float32, device=queries.device)
    tile, chunk = 128, 64
    if n == 0:
        return scores
    tiles = (triton.cdiv(stride, tile), triton.cdiv(n, tile), maps)
    sizes = {"HEAD_DIM": head_dim, "PADDED_DIM": triton.cdiv(head_dim, chunk) * chunk, "CHUNK": chunk, "TILE": tile}
    _scores_kernel[tiles](queries, keys, scores, n, stride, scale, **sizes, num_warps=8)
    if values is not None:
        values = values - values.mean(1, keepdim=True)  # distances stay, and are not lost in rounding
        largest = (4 * values.square().sum(2).amax(1)).clamp(min=1e-30)  # no distance is above twice the longest value
        outputs = torch.empty_like(values)
        lse = torch.empty(maps, n, dtype=torch.float32, device=queries.device)
        _outputs_kernel[(triton.cdiv(n, 64), maps)](
            scores, values, outputs, lse, n, stride,
            HEAD_DIM=head_dim, PADDED_DIM=max(16, triton.next_power_of_2(head_dim)), TILE=64, num_warps=4,
        )  # fmt: skip
        _value_kernel[tiles](scores, outputs, values, lse, largest, n, stride, NEAREST**2, **sizes, num_warps=8)
    return scores


@triton.jit
def _scores_kernel(
    q_ptr, k_ptr, scores_ptr, n, stride, scale,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    map_id = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * TILE + tl.arange(0, TILE)
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    acc = tl.zeros([TILE, TILE], tl.float32)
    for start in tl.range(0, PADDED_DIM, CHUNK):
        dims = start + tl.arange(0, CHUNK)
        q = tl.load(
            q_ptr + (map_id * n + row)[:, None] * HEAD_DIM + dims[None, :],
            mask=(row < n)[:, None] & (dims < HEAD_DIM)[None, :], other=0.0,
        )  # fmt: skip
        k = tl.load(
            k_ptr + (map_id * n + column)[:, None] * HEAD_DIM + dims[None, :],
            mask=(column < n)[:, None] & (dims < HEAD_DIM)[None, :], other=0.0,
        )  # fmt: skip
        acc = tl.dot(q, k.T, acc, input_precision="tf32x3")
    acc = tl.where((column < n)[None, :], acc * scale, float("-inf"))
    to = (map_id * n + row)[:, None] * stride + column[None, :]
    tl.store(scores_ptr + to, acc, mask=(row < n)[:, None] & (column < stride)[None, :])


@triton.jit
def _outputs_kernel(
    scores_ptr, v_ptr, out_ptr, lse_ptr, n, stride,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Compute the draft's output, each row's softmax over the mean values, and the log-sum-exp of its scores."""
    map_id = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    dims = tl.arange(0, PADDED_DIM)
    peak = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, PADDED_DIM], tl.float32)
    for start in tl.range(0, n, TILE):
        column = start + tl.arange(0, TILE)
        scores = tl.load(
            scores_ptr + (map_id * n + row)[:, None] * stride + column[None, :],
            mask=(row < n)[:, None] & (column < n)[None, :], other=float("-inf"),
        )  # fmt: skip
        scores = tl.where((row < n)[:, None], scores, 0.0)  # rows behind the last are not stored
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp(scores - new_peak[:, None])
        shrink = tl.exp(peak - new_peak)
        v = tl.load(
            v_ptr + (map_id * n + column)[:, None] * HEAD_DIM + dims[None, :],
            mask=(column < n)[:, None] & (dims < HEAD_DIM)[None, :], other=0.0,
        )  # fmt: skip
        acc = tl.dot(weights, v, acc * shrink[:, None], input_precision="tf32x3")
        total = total * shrink + tl.sum(weights, 1)
        peak = new_peak
    to = out_ptr + (map_id * n + row)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(to, acc / total[:, None], mask=(row < n)[:, None] & (dims < HEAD_DIM)[None, :])
    tl.store(lse_ptr + map_id * n + row, peak + tl.log(total), mask=row < n)


@triton.jit
def _value_kernel(
    scores_ptr, out_ptr, v_ptr, lse_ptr, largest_ptr, n, stride, nearest,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Turn scores by mass into scores by value, in place."""
    map_id = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * TILE + tl.arange(0, TILE)
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    products = tl.zeros([TILE, TILE], tl.float32)
    of_rows = tl.zeros([TILE], tl.float32)
    of_columns = tl.zeros([TILE], tl.float32)
    for start in tl.range(0, PADDED_DIM, CHUNK):
        dims = start + tl.arange(0, CHUNK)
        o = tl.load(
            out_ptr + (map_id * n + row)[:, None] * HEAD_DIM + dims[None, :],
            mask=(row < n)[:, None] & (dims < HEAD_DIM)[None, :], other=0.0,
        )  # fmt: skip
        v = tl.load(
            v_ptr + (map_id * n + column)[:, None] * HEAD_DIM + dims[None, :],
            mask=(column < n)[:, None] & (dims < HEAD_DIM)[None, :], other=0.0,
        )  # fmt: skip
        products = tl.dot(o, v.T, products, input_precision="tf32x3")
        of_rows += tl.sum(o * o, 1)
        of_columns += tl.sum(v * v, 1)
    distance = (of_rows[:, None] + of_columns[None, :] - 2 * products) / tl.load(largest_ptr + map_id)
    at = scores_ptr + (map_id * n + row)[:, None] * stride + column[None, :]
    mask = (row < n)[:, None] & (column < n)[None, :]
    lse = tl.load(lse_ptr + map_id * n + row, mask=row < n, other=0.0)
    scores = tl.load(at, mask=mask, other=0.0) - lse[:, None] + 0.5 * tl.log(tl.maximum(distance, nearest))
    tl.store(at, scores, mask=mask)
