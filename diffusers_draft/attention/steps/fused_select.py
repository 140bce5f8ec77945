"""Triton: from block means to kept block lists by radix selection. Nothing is sorted, nothing is read on the host.

Scores are logarithms. A pair's rank by mass is that of its draft-map value, so scores are compared as
`score - logsumexp(row)`; by value, the logarithm of the distance is added. Both are compared in fixed point: keys of
31 bits with steps of 2**-25, which is finer than float32 for draft-map values below 0.6.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_mask import BlockMask
from ..layout import TokenLayout
from ..select import blocks_of_row, pairs_of_head
from .fused_scores import block_scores

MAX_SCORES = 1 << 28
"""Scores held at once (1 GiB of float32): longer videos are selected a few heads at a time."""

DIGITS = ((25, 6), (19, 6), (9, 10), (0, 9))
"""(shift, bits) of a key's digits. The first two passes count all scores, the others only what is left near the
threshold."""

_TOP = tl.constexpr(0x7FFFFFFF)


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
    """Choose the same pairs as `plain.select`, up to the rounding of the scores.

    Args:
        query_means: `(B, H, Nv, D)` float32, contiguous.
        key_means: as `query_means`.
        value_means: as `query_means`; None to score by mass alone.
        scale: factor on the scores.
        sparsity: share of the video pairs to skip, in [0, 1).
        budget: `"head"` or `"row"`.
        layout: the block order.
        kv_len: `(B,)` leading valid keys or None.
    """
    batch, heads, num_video, _ = query_means.shape
    num_blocks, block = layout.num_blocks, layout.block
    device = query_means.device
    kv_len = None if kv_len is None else kv_len.to(device=device, dtype=torch.int32)
    kv_indices = torch.empty(batch, heads, num_blocks, num_blocks, dtype=torch.int32, device=device)
    kv_num_blocks = torch.empty(batch, heads, num_blocks, dtype=torch.int32, device=device)
    means = [tensor.flatten(0, 1) for tensor in (query_means, key_means, value_means) if tensor is not None]
    lists = kv_indices.flatten(0, 1), kv_num_blocks.flatten(0, 1)
    pick = {"head": _pick_by_head, "row": _pick_by_row}[budget]
    step = max(1, MAX_SCORES // max(1, num_video**2))
    for first in range(0, batch * heads, step):
        some = slice(first, first + step)
        indices, counts = (tensor[some] for tensor in lists)
        sizes = (kv_indices if kv_len is None else kv_len, num_video, num_blocks, first, heads, block)
        shape = {
            "HAS_LEN": kv_len is not None,
            "COLUMNS": triton.next_power_of_2(max(num_video, 1)),
            "ANCHORS": triton.next_power_of_2(num_blocks - num_video + 1),
            "ALL": triton.next_power_of_2(num_blocks),
        }
        scores = block_scores(*(tensor[some] for tensor in means), scale=scale)
        pick(scores, value_means is not None, sparsity, indices, counts, sizes, shape)
    return BlockMask(kv_num_blocks, kv_indices, kv_len, layout.seq_len, block, num_video)


def _pick_by_head(
    scores: Tensor, normalised: bool, sparsity: float, indices: Tensor, counts: Tensor, sizes, shape
) -> None:
    maps, n, stride = scores.shape
    device = scores.device
    row_lse = torch.zeros(maps, n, dtype=torch.float32, device=device)
    histograms = torch.zeros(len(DIGITS), maps, 1024, dtype=torch.int32, device=device)
    threshold = torch.zeros(maps, dtype=torch.int32, device=device)
    ties = torch.zeros(maps, n, dtype=torch.int32, device=device)
    wanted = torch.full((maps,), pairs_of_head(n, sparsity), dtype=torch.int32, device=device)
    columns = shape["COLUMNS"]
    if n:
        for histogram, (shift, bits) in zip(histograms, DIGITS, strict=True):
            _histogram_kernel[(n, maps)](
                scores, row_lse, histogram, threshold, n, stride,
                NORMALISE=shift == DIGITS[0][0] and not normalised, SHIFT=shift, BITS=bits, COLUMNS=columns,
                num_warps=2,
            )  # fmt: skip
            _digit_kernel[(maps,)](histogram, wanted, threshold, SHIFT=shift, num_warps=4)
        _ties_kernel[(n, maps)](scores, row_lse, wanted, threshold, ties, n, stride, COLUMNS=columns, num_warps=2)
    ties_before = ties.cumsum(1, dtype=torch.int32) - ties
    _head_kernel[(counts.shape[-1], maps)](
        scores, row_lse, threshold, ties_before, wanted, indices, counts, stride, *sizes, **shape, num_warps=2
    )


def _pick_by_row(
    scores: Tensor, normalised: bool, sparsity: float, indices: Tensor, counts: Tensor, sizes, shape
) -> None:
    maps, n, stride = scores.shape
    wanted = blocks_of_row(n, sparsity)
    _row_kernel[(counts.shape[-1], maps)](scores, wanted, indices, counts, stride, *sizes, **shape, num_warps=1)


@triton.jit
def _load_scores(scores_ptr, map_id, row, n, stride, COLUMNS: tl.constexpr):
    column = tl.arange(0, COLUMNS)
    at = (map_id.to(tl.int64) * n + row) * stride + column
    return tl.load(scores_ptr + at, mask=(column < stride) & (row < n), other=float("-inf"))


@triton.jit
def _keys(scores, lse, row, n, COLUMNS: tl.constexpr):
    """Make fixed-point ranks: the own block above all, columns outside the map at -1, and no others there.

    Scores that are no numbers rank somewhere: as many pairs are kept, and the output is what the model made it.
    """
    column = tl.arange(0, COLUMNS)
    gap = scores - lse
    gap = tl.where(gap > -63.9, tl.minimum(gap, 0.0), -63.9)
    keys = tl.maximum(tl.minimum((gap * 33554432.0).to(tl.int32) + _TOP, _TOP - 1), 0)
    keys = tl.where(column == row, _TOP, keys)
    return tl.where(column < n, keys, -1)


@triton.jit
def _logsumexp(scores):
    peak = tl.max(scores, 0)
    return peak + tl.log(tl.sum(tl.exp(scores - peak), 0))


@triton.jit
def _histogram_kernel(
    scores_ptr, lse_ptr, histogram_ptr, threshold_ptr, n, stride,
    NORMALISE: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Count one digit of the keys whose higher digits are those of the threshold."""
    BINS: tl.constexpr = 1 << BITS
    row = tl.program_id(0)
    map_id = tl.program_id(1)
    histogram_ptr += map_id * 1024
    scores = _load_scores(scores_ptr, map_id, row, n, stride, COLUMNS)
    if NORMALISE:
        lse = _logsumexp(scores)
        tl.store(lse_ptr + map_id * n + row, lse)
    else:
        lse = tl.load(lse_ptr + map_id * n + row)
    keys = _keys(scores, lse, row, n, COLUMNS) >> SHIFT
    digit = keys & (BINS - 1)
    match = (keys >= 0) & (keys >> BITS == tl.load(threshold_ptr + map_id) >> SHIFT >> BITS)
    if BITS <= 6:
        bins = tl.arange(0, BINS)
        others = COLUMNS - tl.sum(match.to(tl.int32), 0)
        counted = tl.histogram(tl.where(match, digit, 0), BINS) - tl.where(bins == 0, others, 0)
        tl.atomic_add(histogram_ptr + bins, counted, mask=counted > 0)
    else:
        tl.atomic_add(histogram_ptr + digit, 1, mask=match)


@triton.jit
def _digit_kernel(histogram_ptr, wanted_ptr, threshold_ptr, SHIFT: tl.constexpr):
    """Find the digit of the key that is the `wanted`-th largest, and how many are wanted from its bin."""
    map_id = tl.program_id(0)
    bins = tl.arange(0, 1024)
    counted = tl.load(histogram_ptr + map_id * 1024 + bins)
    at_least = tl.cumsum(counted, 0, reverse=True)
    wanted = tl.load(wanted_ptr + map_id)
    digit = tl.sum((at_least >= wanted).to(tl.int32), 0) - 1
    wanted -= tl.sum(tl.where(bins > digit, counted, 0), 0)
    threshold = tl.load(threshold_ptr + map_id) + (digit << SHIFT)
    if SHIFT == 0:
        # If all keys at the threshold are wanted, one less says the same without ties.
        no_ties = tl.sum(tl.where(bins == digit, counted, 0), 0) == wanted
        threshold = tl.where(no_ties, threshold - 1, threshold)
        wanted = tl.where(no_ties, 0, wanted)
    tl.store(wanted_ptr + map_id, wanted)
    tl.store(threshold_ptr + map_id, threshold)


@triton.jit
def _ties_kernel(
    scores_ptr, lse_ptr, wanted_ptr, threshold_ptr, ties_ptr, n, stride, COLUMNS: tl.constexpr
):  # fmt: skip
    """Count each row's keys at the threshold, where only some of them are wanted."""
    row = tl.program_id(0)
    map_id = tl.program_id(1)
    if tl.load(wanted_ptr + map_id) > 0:
        lse = tl.load(lse_ptr + map_id * n + row)
        keys = _keys(_load_scores(scores_ptr, map_id, row, n, stride, COLUMNS), lse, row, n, COLUMNS)
        tl.store(ties_ptr + map_id * n + row, tl.sum((keys == tl.load(threshold_ptr + map_id)).to(tl.int32), 0))


@triton.jit
def _write_row(
    keys, threshold, ties_before, ties_wanted, indices_ptr, counts_ptr, map_id, row,
    kv_len_ptr, n, num_blocks, first, heads, block,
    HAS_LEN: tl.constexpr, COLUMNS: tl.constexpr, ANCHORS: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """Write one list: the keys above the threshold, the first ties in index order, then the anchors."""
    valid = num_blocks
    if HAS_LEN:
        valid = (tl.load(kv_len_ptr + (first + map_id) // heads) + block - 1) // block
    start = (map_id.to(tl.int64) * num_blocks + row) * num_blocks
    kept = num_blocks * 0
    if row < n:
        keep = keys > threshold
        if ties_wanted > 0:
            ties = keys == threshold
            tie_rank = ties_before + tl.cumsum(ties.to(tl.int32), 0) - 1
            keep = keep | (ties & (tie_rank < ties_wanted))
        slot = tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(indices_ptr + start + slot, tl.arange(0, COLUMNS), mask=keep)
        kept += tl.sum(keep.to(tl.int32), 0)
        anchor = tl.arange(0, ANCHORS)
        tl.store(indices_ptr + start + kept + anchor, n + anchor, mask=n + anchor < valid)
        kept += valid - n
    else:
        column = tl.arange(0, ALL)
        tl.store(indices_ptr + start + column, column, mask=column < valid)
        kept += valid
    tl.store(counts_ptr + map_id * num_blocks + row, kept)


@triton.jit
def _head_kernel(
    scores_ptr, lse_ptr, threshold_ptr, ties_before_ptr, wanted_ptr, indices_ptr, counts_ptr,
    stride, kv_len_ptr, n, num_blocks, first, heads, block,
    HAS_LEN: tl.constexpr, COLUMNS: tl.constexpr, ANCHORS: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    map_id = tl.program_id(1)
    is_video = row < n
    lse = tl.load(lse_ptr + map_id * n + row, mask=is_video, other=0.0)
    ties_before = tl.load(ties_before_ptr + map_id * n + row, mask=is_video, other=0)
    keys = _keys(_load_scores(scores_ptr, map_id, row, n, stride, COLUMNS), lse, row, n, COLUMNS)
    _write_row(
        keys, tl.load(threshold_ptr + map_id), ties_before, tl.load(wanted_ptr + map_id),
        indices_ptr, counts_ptr, map_id, row, kv_len_ptr, n, num_blocks, first, heads, block,
        HAS_LEN, COLUMNS, ANCHORS, ALL,
    )  # fmt: skip


@triton.jit
def _row_kernel(
    scores_ptr, wanted, indices_ptr, counts_ptr, stride, kv_len_ptr, n, num_blocks, first, heads, block,
    HAS_LEN: tl.constexpr, COLUMNS: tl.constexpr, ANCHORS: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """Find a row's threshold bit by bit, in registers, and writes its list."""
    row = tl.program_id(0)
    map_id = tl.program_id(1)
    scores = _load_scores(scores_ptr, map_id, row, n, stride, COLUMNS)
    keys = tl.full([COLUMNS], -1, tl.int32)
    threshold = row * 0
    if row < n:
        keys = _keys(scores, tl.max(scores, 0), row, n, COLUMNS)  # within a row any constant will do
        bit = 30
        found = n
        while (bit >= 0) & (found != wanted):
            higher = threshold | (1 << bit)
            at_least = tl.sum((keys >= higher).to(tl.int32), 0)
            threshold = tl.where(at_least >= wanted, higher, threshold)
            found = tl.where(at_least >= wanted, at_least, found)
            bit -= 1
        threshold = tl.where(found == wanted, threshold - 1, threshold)
    ties_wanted = wanted - tl.sum((keys > threshold).to(tl.int32), 0)
    _write_row(
        keys, threshold, 0, ties_wanted, indices_ptr, counts_ptr, map_id, row,
        kv_len_ptr, n, num_blocks, first, heads, block, HAS_LEN, COLUMNS, ANCHORS, ALL,
    )  # fmt: skip
