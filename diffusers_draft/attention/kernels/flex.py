"""FlexAttention with our block lists, always compiled: eager FlexAttention ignores block lists."""

import functools

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask
from torch.nn.attention.flex_attention import flex_attention

from ..block_mask import BlockMask


@functools.cache
def _compiled():
    return torch.compile(flex_attention)


def refusal(device: torch.device, dtype: torch.dtype, head_dim: int, block: int) -> str | None:
    """Say why this backend cannot run, or None."""
    return f"needs float32, float16 or bfloat16, got {dtype}" if dtype == torch.float64 else None


def forward(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """Attend to the kept blocks; tensors are `(B, S, H, D)` in block order."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    out = _compiled()(query, key, value, block_mask=_flex_mask(mask), scale=scale)
    return out.transpose(1, 2).contiguous()


def _flex_mask(mask: BlockMask) -> FlexBlockMask:
    """Split the lists into full blocks and the one block at a sample's valid length, the only one masked by token."""
    valid_len = mask.valid_len
    tail = mask.tail_block[:, None, None]
    last = (mask.kv_num_blocks - 1).long()[..., None]
    ends_in_tail = (mask.kv_indices.gather(-1, last)[..., 0] == tail).int()

    def is_valid(sample: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
        return key_index < valid_len[sample]

    sizes = (mask.seq_len, mask.seq_len)
    tail_indices = torch.zeros_like(mask.kv_indices)
    tail_indices[..., 0] = tail
    # The constructor, not `from_kv_blocks`: that also transposes the lists for the backward, through a dense map.
    # The backward never runs; older versions of torch insist on lists for it.
    return FlexBlockMask(
        seq_lengths=sizes,
        kv_num_blocks=ends_in_tail,
        kv_indices=tail_indices,
        full_kv_num_blocks=mask.kv_num_blocks - ends_in_tail,
        full_kv_indices=mask.kv_indices,
        q_num_blocks=ends_in_tail,
        q_indices=tail_indices,
        full_q_num_blocks=ends_in_tail,
        full_q_indices=tail_indices,
        BLOCK_SIZE=(mask.block, mask.block),
        mask_mod=is_valid,
    )
