"""FlashAttention-4 (CuTe) with our block lists, on Hopper and datacentre Blackwell."""

import torch
from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
from flash_attn.cute.interface import _flash_attn_fwd
from torch import Tensor

from ..block_mask import BlockMask


def refusal(device: torch.device, dtype: torch.dtype, head_dim: int, block: int) -> str | None:
    """Say why this backend cannot run, or None."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"needs an NVIDIA GPU, got {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] not in (9, 10):
        # On compute capability 8.x the package accepts the lists and attends densely.
        return f"needs Hopper or datacentre Blackwell, got compute capability {capability[0]}.{capability[1]}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"needs float16 or bfloat16, got {dtype}"
    if block != 128:
        return f"needs blocks of 128 tokens, got {block}"
    if head_dim not in (64, 96, 128):
        return f"needs head_dim 64, 96 or 128, got {head_dim}"
    return None


def forward(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """Attend to the kept blocks; tensors are float16 or bfloat16, `(B, S, H, D)` in block order."""
    batch, seq_len, heads, head_dim = query.shape
    out = torch.empty(batch, heads, seq_len, head_dim, dtype=query.dtype, device=query.device).transpose(1, 2)
    video = mask.num_video_blocks
    tail = mask.tail_block
    if video:
        rows = slice(0, min(video * mask.block, seq_len))
        counts, indices = mask.kv_num_blocks[:, :, :video], mask.kv_indices[:, :, :video]
        ends_in_tail = (_last(counts, indices) == tail[:, None, None]).int()
        lists = _lists(counts - ends_in_tail, indices, ends_in_tail, tail[:, None, None, None])
        _run(query[:, rows], key, value, lists, mask.kv_len, scale, out=out[:, rows])
    if video * mask.block < seq_len:
        for sample in range(batch):
            one = slice(sample, sample + 1)
            out[one, video * mask.block :] = _attend_to_all(
                query[one, video * mask.block :], key[one], value[one], tail[one], mask, sample, scale
            )
    return out


def _attend_to_all(
    query: Tensor, key: Tensor, value: Tensor, tail: Tensor, mask: BlockMask, sample: int, scale: float
) -> Tensor:
    """Attend with one sample's few anchor queries to all its valid keys.

    The keys are split among entries of a batch that share memory: a row of every block, left to a single thread
    block, would still run when the rest of the GPU has finished (1.3 instead of 0.6 ms for 256 queries on an H200).
    """
    num_blocks = mask.kv_num_blocks.shape[-1]
    query_blocks = -(-query.shape[1] // mask.block)
    processors = torch.cuda.get_device_properties(query.device).multi_processor_count
    splits = max(1, min(num_blocks // 8, 2 * processors // (query_blocks * query.shape[2])))
    size = -(-num_blocks // splits)
    first = torch.arange(splits, dtype=torch.int32, device=query.device)[:, None, None] * size
    indices = first[..., None] + torch.arange(size, dtype=torch.int32, device=query.device)
    has_tail = ((first <= tail) & (tail < first + size)).int()
    lists = _lists(
        (tail - first).clamp(0, size).expand(splits, 1, query_blocks),
        indices.expand(splits, 1, query_blocks, size),
        has_tail.expand(splits, 1, query_blocks),
        tail.view(1, 1, 1, 1),
    )
    query, key, value = (tensor.expand(splits, -1, -1, -1) for tensor in (query, key, value))
    kv_len = None if mask.kv_len is None else mask.kv_len[sample].repeat(splits)
    out, lse = _run(query, key, value, lists, kv_len, scale)
    weights = torch.softmax(lse, dim=0).transpose(1, 2).unsqueeze(-1)
    return (out * weights).sum(0, keepdim=True)


def _last(counts: Tensor, indices: Tensor) -> Tensor:
    return indices.gather(-1, counts.long()[..., None] - 1)[..., 0]


def _lists(full_counts: Tensor, full_indices: Tensor, tail_counts: Tensor, tail: Tensor) -> BlockSparseTensorsTorch:
    """List full blocks, and the block at the valid length, which the kernel masks by token."""
    return BlockSparseTensorsTorch(
        mask_block_cnt=tail_counts.contiguous(),
        mask_block_idx=tail.expand(*tail_counts.shape, 1).contiguous(),
        full_block_cnt=full_counts.contiguous(),
        full_block_idx=full_indices,
        block_size=(128, 128),
    )


def _run(
    query: Tensor, key: Tensor, value: Tensor, lists: BlockSparseTensorsTorch, kv_len: Tensor | None, scale: float,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the attention, in `out` if given, and else the log-sum-exp of every row's scores, `(B, H, S)`."""
    options = {"softmax_scale": scale, "block_sparse_tensors": lists, "seqused_k": kv_len}
    return _flash_attn_fwd(query, key, value, **options, return_lse=out is None, out=out)[:2]
