"""The package `block_sparse_attn` (mit-han-lab/Block-Sparse-Attention), the kernel of the paper, from Ampere on."""

import block_sparse_attn  # noqa: F401  registers the operator
import torch
from torch import Tensor

from ..block_mask import BlockMask

# The public function turns a bool mask into the operator's lists, which sorts all pairs and waits for the device.
_attend = torch.ops.flash_attn._block_sparse_attn_forward


def refusal(device: torch.device, dtype: torch.dtype, head_dim: int, block: int) -> str | None:
    """Say why this backend cannot run, or None."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"needs an NVIDIA GPU, got {device}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs compute capability 8.0 (Ampere) or later"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"needs float16 or bfloat16, got {dtype}"
    if block != 128:
        return f"needs blocks of 128 tokens, got {block}"
    if head_dim not in (32, 64, 128):
        return f"needs head_dim 32, 64 or 128, got {head_dim}"
    return None


def forward(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """Attend to the kept blocks; tensors are float16 or bfloat16, `(B, S, H, D)` in block order.

    Samples are launched one by one: the operator takes packed sequences, and to pack keys of different lengths would
    need the lengths on the host.
    """
    batch, seq_len, heads, _ = query.shape
    device = query.device
    kinds = torch.arange(1, heads + 1, dtype=torch.int32, device=device)  # head h is sparse and has the h-th lists
    no_streaming = torch.zeros(2 * heads, dtype=torch.int32, device=device)
    ends = torch.zeros(batch, 2, dtype=torch.int32, device=device)
    query_ends, key_ends = ends.clone(), ends
    query_ends[:, 1] = seq_len
    key_ends[:, 1] = mask.valid_len
    lists = _descending(mask)
    outs = [
        _attend(
            query[i], key[i], value[i], query_ends[i], key_ends[i], 128, 128, kinds, no_streaming, lists[i : i + 1],
            seq_len, seq_len, 0.0, scale, False, False, False, -1, -1,
        )[0]
        for i in range(batch)
    ]  # fmt: skip
    return torch.stack(outs) if batch > 1 else outs[0].unsqueeze(0)


def _descending(mask: BlockMask) -> Tensor:
    """Make `(B, H, N, N)` int32, each row's kept key blocks from the last to the first, then -1."""
    counts = mask.kv_num_blocks.unsqueeze(-1)
    slot = counts - 1 - torch.arange(mask.kv_indices.shape[-1], dtype=torch.int32, device=counts.device)
    # The kernel reads, and ignores, one entry behind a full row: behind the last row there must be memory, too.
    lists = mask.kv_indices.new_empty(mask.kv_indices.numel() + 1)[:-1].view_as(mask.kv_indices)
    torch.gather(mask.kv_indices, -1, slot.clamp(min=0).long(), out=lists)
    return lists.masked_fill_(slot < 0, -1)
