"""Our own block-sparse attention in Triton, for Ampere and later: TMA descriptors on Hopper and later, else pointers.

The scores of the next block are computed before the softmax of this one, so that the tensor cores work while the
exponentials are taken (509 instead of 479 TFLOP/s on an H200 at head_dim 128).
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..block_mask import BlockMask

BLOCKS = (64, 128)
LARGE = 64
"""From so many blocks on, configurations are timed on the real problem instead of the small one of the probe."""


def refusal(device: torch.device, dtype: torch.dtype, head_dim: int, block: int) -> str | None:
    """Say why this backend cannot run, or None."""
    if device.type != "cuda":
        return f"needs a GPU, got {device}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"needs float16 or bfloat16, got {dtype}"
    if block not in BLOCKS:
        return f"needs blocks of 64 or 128 tokens, got {block}"
    if head_dim > 128:
        return f"needs head_dim up to 128, got {head_dim}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "needs compute capability 8.0 (Ampere) or later"
    return None


def forward(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float, lse: Tensor | None = None
) -> Tensor:
    """Attend to the kept blocks; tensors are `(B, S, H, D)` in block order.

    Args:
        query: float16 or bfloat16; any strides with the last one 1.
        key: as `query`.
        value: as `query`.
        mask: the kept blocks.
        scale: factor on the scores.
        lse: `(B, H, S)` float32, contiguous; filled with the log-sum-exp of every row's scores if given.

    Returns:
        `(B, S, H, D)` with the memory of `(B, H, S, D)`.
    """
    batch, seq_len, heads, head_dim = query.shape
    num_blocks = mask.kv_num_blocks.shape[-1]
    out = torch.empty(batch, heads, seq_len, head_dim, dtype=query.dtype, device=query.device).transpose(1, 2)
    tma = _has_tma(query.device)
    tensors = [_descriptor(x) if tma else x for x in (query, key, value)]
    strides = [stride for x in (query, key, value, out) for stride in x.stride()[:3]]
    _attend_kernel[(num_blocks, heads, batch)](
        *tensors, out, out if lse is None else lse, mask.kv_num_blocks, mask.kv_indices,
        mask.kv_num_blocks if mask.kv_len is None else mask.kv_len,
        *strides, seq_len, heads, num_blocks, scale / math.log(2),
        HEAD_DIM=head_dim, PADDED_DIM=max(16, triton.next_power_of_2(head_dim)), BLOCK=mask.block,
        LARGE=num_blocks >= LARGE, HAS_LEN=mask.kv_len is not None, HAS_LSE=lse is not None, TMA=tma,
    )  # fmt: skip
    return out


@functools.cache
def _has_tma(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9


def _descriptor(tokens: Tensor) -> TensorDescriptor:
    by_head = tokens.transpose(1, 2)
    # The kernel's configuration sets the block shape.
    return TensorDescriptor(by_head, list(by_head.shape), list(by_head.stride()), [1, 1, 16, 16])


def _set_block_shapes(arguments: dict) -> None:
    if arguments["TMA"]:
        dim = arguments["PADDED_DIM"]
        arguments["q_ptr"].block_shape = [1, 1, arguments["BLOCK"], dim]
        for name in ("k_ptr", "v_ptr"):
            arguments[name].block_shape = [1, 1, arguments["BLOCK_N"], dim]


def _configurations() -> list[triton.Config]:
    candidates = [(128, 8, 2), (64, 8, 3), (64, 4, 2), (32, 4, 3)]
    if triton.knobs.runtime.interpret:
        candidates = candidates[-1:]  # there is nothing to time
    return [
        triton.Config({"BLOCK_N": rows}, num_warps=warps, num_stages=stages, pre_hook=_set_block_shapes)
        for rows, warps, stages in candidates
    ]


def _fitting(configurations: list[triton.Config], arguments: dict, **constants: object) -> list[triton.Config]:
    block = constants["BLOCK"]
    return [c for c in configurations if c.kwargs["BLOCK_N"] <= block and (block == 128 or c.num_warps == 4)]


@triton.jit
def _load_rows(ptr, sample, head, start, stride_b, stride_s, stride_h, seq_len,
               ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    if TMA:
        return ptr.load([sample, head, start, 0]).reshape(ROWS, PADDED_DIM)
    else:
        rows = start + tl.arange(0, ROWS)
        dims = tl.arange(0, PADDED_DIM)
        base = ptr + sample.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
        mask = (rows < seq_len)[:, None] & (dims < HEAD_DIM)[None, :]
        return tl.load(base + rows.to(tl.int64)[:, None] * stride_s + dims[None, :], mask=mask, other=0.0)


@triton.jit
def _softmax_step(scores, peak, total, acc, scale):
    """Do one step of online softmax; `scale` holds the factor that turns exp into exp2."""
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
    weights = tl.math.exp2(scores * scale - new_peak[:, None])
    shrink = tl.math.exp2(peak - new_peak)
    return weights, new_peak, total * shrink + tl.sum(weights, 1), acc * shrink[:, None]


@triton.autotune(
    _configurations(),
    key=["HEAD_DIM", "BLOCK", "LARGE", "TMA"],
    prune_configs_by={"early_config_prune": _fitting},
    cache_results=True,
)
@triton.jit
def _attend_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, counts_ptr, indices_ptr, kv_len_ptr,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h,
    v_stride_b, v_stride_s, v_stride_h, out_stride_b, out_stride_s, out_stride_h,
    seq_len, heads, num_blocks, scale,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK: tl.constexpr, LARGE: tl.constexpr,
    HAS_LEN: tl.constexpr, HAS_LSE: tl.constexpr, TMA: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = BLOCK // BLOCK_N
    # Anchor rows are the longest and the last of a head: they go first, so that none of them ends alone.
    block = num_blocks - 1 - tl.program_id(0)
    head = tl.program_id(1)
    sample = tl.program_id(2)
    row = (sample * heads + head) * num_blocks + block
    count = tl.load(counts_ptr + row)
    indices_ptr += row.to(tl.int64) * num_blocks
    kv_len = seq_len
    if HAS_LEN:
        kv_len = tl.load(kv_len_ptr + sample)

    q = _load_rows(q_ptr, sample, head, block * BLOCK, q_stride_b, q_stride_s, q_stride_h, seq_len,
                   BLOCK, HEAD_DIM, PADDED_DIM, TMA)  # fmt: skip
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, PADDED_DIM], tl.float32)
    in_part = tl.arange(0, BLOCK_N)

    start = tl.load(indices_ptr) * BLOCK
    k = _load_rows(k_ptr, sample, head, start, k_stride_b, k_stride_s, k_stride_h, seq_len,
                   BLOCK_N, HEAD_DIM, PADDED_DIM, TMA)  # fmt: skip
    scores = tl.dot(q, k.T)
    for i in tl.range(1, count * PARTS):
        next_start = tl.load(indices_ptr + i // PARTS) * BLOCK + (i % PARTS) * BLOCK_N
        k = _load_rows(k_ptr, sample, head, next_start, k_stride_b, k_stride_s, k_stride_h, seq_len,
                       BLOCK_N, HEAD_DIM, PADDED_DIM, TMA)  # fmt: skip
        next_scores = tl.dot(q, k.T)
        # Only a list's last block can hold keys behind the valid length; the step after the loop masks it.
        if PARTS > 1:
            scores = tl.where((start + in_part < kv_len)[None, :], scores, float("-inf"))
        weights, peak, total, acc = _softmax_step(scores, peak, total, acc, scale)
        v = _load_rows(v_ptr, sample, head, start, v_stride_b, v_stride_s, v_stride_h, seq_len,
                       BLOCK_N, HEAD_DIM, PADDED_DIM, TMA)  # fmt: skip
        acc = tl.dot(weights.to(v.dtype), v, acc)
        scores = next_scores
        start = next_start
    scores = tl.where((start + in_part < kv_len)[None, :], scores, float("-inf"))
    weights, peak, total, acc = _softmax_step(scores, peak, total, acc, scale)
    v = _load_rows(v_ptr, sample, head, start, v_stride_b, v_stride_s, v_stride_h, seq_len,
                   BLOCK_N, HEAD_DIM, PADDED_DIM, TMA)  # fmt: skip
    acc = tl.dot(weights.to(v.dtype), v, acc) / total[:, None]

    rows = block * BLOCK + tl.arange(0, BLOCK)
    dims = tl.arange(0, PADDED_DIM)
    out_ptr += sample.to(tl.int64) * out_stride_b + head.to(tl.int64) * out_stride_h
    to = out_ptr + rows.to(tl.int64)[:, None] * out_stride_s + dims[None, :]
    mask = (rows < seq_len)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(to, acc.to(out_ptr.dtype.element_ty), mask=mask)
    if HAS_LSE:
        lse = (peak + tl.math.log2(total)) * 0.6931471805599453
        tl.store(lse_ptr + (sample * heads + head).to(tl.int64) * seq_len + rows, lse, mask=rows < seq_len)
