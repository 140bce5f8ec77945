"""Triton: from block means to the scores of all pairs of blocks, as logarithms.

Products are taken in TF32 and, of values, in float16: their rounding is about that of the means of bfloat16 tokens and
moves pairs at the very edge of what is kept, no others.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

NEAREST = 2**-11
"""The least distance of a block's mean value from the output, relative to the largest possible, that float16 tells
from none. Nearer ones count as so far: of a row that looks at one block alone, the output is that block's value."""
NARROWEST = 64
"""With 16 or 32 columns and one stage, Triton's code for Hopper reads past its shared memory (3.6: NaN or a fault)."""


def block_scores(queries: Tensor, keys: Tensor, values: Tensor | None = None, *, scale: float) -> Tensor:
    """Compute `(maps, n, n rounded up to 16)` scores, -inf behind column n: aligned rows are read 16 bytes at a time.

    By mass they are those of the draft; by value they are at most 0 and need no normalisation.
    """
    maps, n, head_dim = queries.shape
    stride = triton.cdiv(n, 16) * 16
    scores = torch.empty(maps, n, stride, dtype=torch.float32, device=queries.device)
    if n == 0:
        return scores
    outputs, lse = scores, scores
    if values is None:
        values = scores
    else:
        values = _standardised(values)
        outputs = torch.empty_like(values)
        lse = torch.empty(maps, n, dtype=torch.float32, device=queries.device)
        _outputs_kernel[(triton.cdiv(n, 64), maps)](
            queries, keys, values, outputs, lse, n, scale, HEAD_DIM=head_dim,
            PADDED_DIM=max(NARROWEST, triton.next_power_of_2(head_dim)), TILE=64, num_warps=4, num_stages=1,
        )  # fmt: skip
    tile, chunk = 128, 32
    _scores_kernel[(triton.cdiv(stride, tile), triton.cdiv(n, tile), maps)](
        queries, keys, outputs, values, lse, scores, n, stride, scale, NEAREST**2,
        HEAD_DIM=head_dim, PADDED_DIM=triton.cdiv(head_dim, chunk) * chunk, CHUNK=chunk, TILE=tile,
        BY_VALUE=outputs is not scores, num_warps=8,
    )  # fmt: skip
    return scores


def _standardised(values: Tensor) -> Tensor:
    """Shift and scale each map's values so that no distance from any output is above 1, in float16."""
    maps, n, head_dim = values.shape
    scaled = torch.empty_like(values, dtype=torch.float16)
    _standardise_kernel[(maps,)](
        values, scaled, n, HEAD_DIM=head_dim, PADDED_DIM=triton.next_power_of_2(head_dim), TILE=64, num_warps=8
    )
    return scaled


@triton.jit
def _load_tile(ptr, map_id, row, dims, n, HEAD_DIM: tl.constexpr):
    mask = (row < n)[:, None] & (dims < HEAD_DIM)[None, :]
    return tl.load(ptr + (map_id * n + row)[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)


@triton.jit
def _standardise_kernel(v_ptr, scaled_ptr, n, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, TILE: tl.constexpr):
    map_id = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, PADDED_DIM)
    total = tl.zeros([PADDED_DIM], tl.float32)
    for start in tl.range(0, n, TILE):
        total += tl.sum(_load_tile(v_ptr, map_id, start + tl.arange(0, TILE), dims, n, HEAD_DIM), 0)
    mean = total / n  # without it distances stay, and are not lost in rounding
    longest = tl.zeros([TILE], tl.float32)
    for start in tl.range(0, n, TILE):
        row = start + tl.arange(0, TILE)
        shifted = _load_tile(v_ptr, map_id, row, dims, n, HEAD_DIM) - mean[None, :]
        shifted = tl.where((row < n)[:, None] & (dims < HEAD_DIM)[None, :], shifted, 0.0)
        longest = tl.maximum(longest, tl.sum(shifted * shifted, 1))
    factor = 0.5 / tl.sqrt(tl.maximum(tl.max(longest, 0), 1e-30))
    for start in tl.range(0, n, TILE):
        row = start + tl.arange(0, TILE)
        scaled = (_load_tile(v_ptr, map_id, row, dims, n, HEAD_DIM) - mean[None, :]) * factor
        to = scaled_ptr + (map_id * n + row)[:, None] * HEAD_DIM + dims[None, :]
        tl.store(to, scaled.to(tl.float16), mask=(row < n)[:, None] & (dims < HEAD_DIM)[None, :])


@triton.jit
def _outputs_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, n, scale,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Compute the draft's output, each row's softmax over the mean values, and the log-sum-exp of its scores."""
    map_id = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    dims = tl.arange(0, PADDED_DIM)
    q = _load_tile(q_ptr, map_id, row, dims, n, HEAD_DIM)
    peak = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, PADDED_DIM], tl.float32)
    for start in tl.range(0, n, TILE):
        column = start + tl.arange(0, TILE)
        k = _load_tile(k_ptr, map_id, column, dims, n, HEAD_DIM)
        scores = tl.where((column < n)[None, :], tl.dot(q, k.T, input_precision="tf32") * scale, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp(scores - new_peak[:, None])
        shrink = tl.exp(peak - new_peak)
        v = _load_tile(v_ptr, map_id, column, dims, n, HEAD_DIM)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None])
        total = total * shrink + tl.sum(weights, 1)
        peak = new_peak
    to = out_ptr + (map_id * n + row)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(to, acc / total[:, None], mask=(row < n)[:, None] & (dims < HEAD_DIM)[None, :])
    tl.store(lse_ptr + map_id * n + row, peak + tl.log(total), mask=row < n)


@triton.jit
def _scores_kernel(
    q_ptr, k_ptr, out_ptr, v_ptr, lse_ptr, scores_ptr, n, stride, scale, nearest,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, BY_VALUE: tl.constexpr,
):  # fmt: skip
    map_id = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * TILE + tl.arange(0, TILE)
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    scores = tl.zeros([TILE, TILE], tl.float32)
    for start in tl.range(0, PADDED_DIM, CHUNK):
        dims = start + tl.arange(0, CHUNK)
        q = _load_tile(q_ptr, map_id, row, dims, n, HEAD_DIM)
        k = _load_tile(k_ptr, map_id, column, dims, n, HEAD_DIM)
        scores = tl.dot(q, k.T, scores, input_precision="tf32")
    scores *= scale
    if BY_VALUE:
        products = tl.zeros([TILE, TILE], tl.float32)
        of_rows = tl.zeros([TILE], tl.float32)
        of_columns = tl.zeros([TILE], tl.float32)
        for start in tl.range(0, PADDED_DIM, CHUNK):
            dims = start + tl.arange(0, CHUNK)
            o = _load_tile(out_ptr, map_id, row, dims, n, HEAD_DIM)
            v = _load_tile(v_ptr, map_id, column, dims, n, HEAD_DIM)
            products = tl.dot(o, v.T, products)
            # Of what was rounded, as the products are: their difference is a distance all the same.
            of_rows += tl.sum(o.to(tl.float32) * o.to(tl.float32), 1)
            of_columns += tl.sum(v.to(tl.float32) * v.to(tl.float32), 1)
        distance = of_rows[:, None] + of_columns[None, :] - 2 * products
        lse = tl.load(lse_ptr + map_id * n + row, mask=row < n, other=0.0)
        scores += 0.5 * tl.log(tl.maximum(distance, nearest)) - lse[:, None]
    scores = tl.where((column < n)[None, :], scores, float("-inf"))
    to = (map_id * n + row)[:, None] * stride + column[None, :]
    tl.store(scores_ptr + to, scores, mask=(row < n)[:, None] & (column < stride)[None, :])
