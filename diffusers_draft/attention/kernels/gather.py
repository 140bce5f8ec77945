"""Plain torch: gathers the kept keys of a few query blocks at a time and runs dense attention on them.

Works on any device and skips what the mask skips. The lists are read on the host, so on a GPU every call waits for
the device; the GPU backends do not.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..block_mask import BlockMask

CHUNK_ELEMENTS = {"cpu": 1 << 21}
"""Most key elements gathered at once: what the caches of a CPU hold, 2**26 on other devices."""


def forward(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """Attend to the kept blocks; tensors are `(B, S, H, D)` in block order, differentiable in all three."""
    batch, seq_len, heads, head_dim = query.shape
    # Blocks start at multiples of `run` in every sample and head, so whole runs are copied instead of tokens.
    run = math.gcd(seq_len, mask.block)
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    query, key, value = (tensor.transpose(1, 2).reshape(-1, run * head_dim) for tensor in (query, key, value))
    num_blocks = mask.kv_num_blocks.shape[-1]
    kv_indices = mask.kv_indices.reshape(-1, num_blocks)
    runs = torch.arange(mask.block // run, device=query.device)
    chunk_elements = CHUNK_ELEMENTS.get(query.device.type, 1 << 26)
    gather = _Gather(key, value, most=0 if keep else max(chunk_elements, num_blocks * mask.block * head_dim))
    written, attended = [], []

    for (kv_blocks, queries, keys), rows in _rows_by_shape(mask).items():
        rows_at_once = max(1, chunk_elements // (kv_blocks * mask.block * head_dim))
        for chunk in rows.to(query.device).split(rows_at_once):
            first_run = (chunk // num_blocks * (seq_len // run))[:, None]
            q_runs = first_run + (chunk % num_blocks)[:, None] * len(runs) + runs[: queries // run]
            kv_runs = kv_indices[chunk, :kv_blocks, None] * len(runs) + runs
            kv_runs = first_run + kv_runs.flatten(1)[:, : math.ceil(keys / run)]
            q = query.index_select(0, q_runs.flatten()).view(len(chunk), 1, queries, head_dim)
            k, v = (kept.view(len(chunk), 1, -1, head_dim)[:, :, :keys] for kept in gather(kv_runs.flatten()))
            out = scaled_dot_product_attention(q, k, v, scale=scale)
            written.append(q_runs.flatten())
            attended.append(out.reshape(-1, run * head_dim))
    out = torch.cat(attended).index_select(0, torch.cat(written).argsort())
    return out.view(batch, heads, seq_len, head_dim).transpose(1, 2)


class _Gather:
    """Copies rows of tensors, at `most` so many elements to the same memory again and again; 0 keeps every copy."""

    def __init__(self, *tensors: Tensor, most: int) -> None:
        self.tensors = tensors
        self.buffers = [tensor.new_empty(most) if most else None for tensor in tensors]

    def __call__(self, rows: Tensor) -> list[Tensor]:
        pairs = zip(self.tensors, self.buffers, strict=True)
        return [torch.index_select(tensor, 0, rows, out=_front(buffer, len(rows), tensor)) for tensor, buffer in pairs]


def _front(buffer: Tensor | None, rows: int, like: Tensor) -> Tensor | None:
    return None if buffer is None else buffer[: rows * like.shape[1]].view(rows, -1)


def _rows_by_shape(mask: BlockMask) -> dict[tuple[int, int, int], Tensor]:
    """Group `(sample, head, query block)` rows by (kept blocks, query tokens, valid key tokens).

    Only a list's last block can be short or partly valid, so a row's valid keys are a prefix of its kept tokens and
    the rows of one group need no mask.
    """
    counts = mask.kv_num_blocks.cpu().long()
    num_blocks = counts.shape[-1]
    last_block = mask.kv_indices.gather(-1, mask.kv_num_blocks[..., None].long() - 1)[..., 0].cpu()
    valid_len = mask.valid_len.cpu().long()[:, None, None]
    keys = (counts - 1) * mask.block + (valid_len - last_block * mask.block).clamp(max=mask.block)
    queries = torch.full((num_blocks,), mask.block, device="cpu")
    queries[-1] = mask.seq_len - (num_blocks - 1) * mask.block
    shapes = torch.stack([counts, queries.expand_as(counts), keys], dim=-1).view(-1, 3)
    unique, group = torch.unique(shapes, dim=0, return_inverse=True)
    rows = group.argsort(stable=True).split(torch.bincount(group).tolist())
    return {tuple(shape): members for shape, members in zip(unique.tolist(), rows, strict=True)}
