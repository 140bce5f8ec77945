"""The oracle: softmax attention under the expanded mask, in float32 or float64, with everything of size S x S."""

import torch
from torch import Tensor

from ..block_mask import BlockMask


def forward(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """Attend densely under `mask`; tensors are `(B, S, H, D)` in block order."""
    token_block = torch.arange(mask.seq_len, device=query.device) // mask.block
    kept = mask.to_dense()[:, :, token_block][..., token_block]
    valid = torch.arange(mask.seq_len, device=query.device) < mask.valid_len[:, None]
    kept &= valid[:, None, None, :]
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = torch.einsum("bqhd,bkhd->bhqk", query.to(dtype), key.to(dtype)) * scale
    weights = torch.softmax(scores.masked_fill(~kept, float("-inf")), dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value.to(dtype)).to(query.dtype)
