"""Which blocks of keys each block of queries attends to, as lists (the form of FlexAttention's `BlockMask`)."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockMask:
    """Kept block pairs of one attention call in block order.

    Attributes:
        kv_num_blocks: `(B, H, N)` int32, how many key blocks each query block attends to; never 0.
        kv_indices: `(B, H, N, N)` int32, their indices, ascending; entries behind `kv_num_blocks` are unused.
            No block that lies wholly at or behind `kv_len` is listed.
        kv_len: `(B,)` int32, how many leading tokens (in block order) are valid keys; None if all are.
        seq_len: `S`, tokens in the sequence.
        block: tokens per block; the last block of the sequence may be short.
        num_video_blocks: query blocks from here on are anchors: their lists hold every block with a valid key.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    kv_len: Tensor | None
    seq_len: int
    block: int
    num_video_blocks: int

    @property
    def valid_len(self) -> Tensor:
        """`(B,)` int32, `kv_len` with the whole sequence where every token is a valid key."""
        if self.kv_len is not None:
            return self.kv_len
        return self.kv_num_blocks.new_full((self.kv_num_blocks.shape[0],), self.seq_len)

    @property
    def tail_block(self) -> Tensor:
        """`(B,)` int32, index of the block that holds the last valid key: the only one that may be partly valid."""
        return (self.valid_len - 1) // self.block

    def density(self) -> Tensor:
        """Compute the share of computed pairs among those of query blocks and blocks with valid keys: a scalar."""
        return density(self.kv_num_blocks, self.tail_block + 1)

    def to_dense(self) -> Tensor:
        """Make `(B, H, N, N)` bool: is this key block kept for this query block?"""
        num_blocks = self.kv_indices.shape[-1]
        listed = torch.arange(num_blocks, device=self.kv_indices.device) < self.kv_num_blocks[..., None]
        columns = torch.where(listed, self.kv_indices, num_blocks).long()
        kept = torch.zeros(*columns.shape[:-1], num_blocks + 1, dtype=torch.bool, device=columns.device)
        return kept.scatter_(-1, columns, True)[..., :num_blocks]


def density(kv_num_blocks: Tensor, valid_blocks: Tensor) -> Tensor:
    """Compute the share of block pairs that were computed.

    Args:
        kv_num_blocks: `(B, H, N)` computed key blocks of each query block.
        valid_blocks: `(B,)` key blocks that hold a valid key.

    Returns:
        Scalar float32.
    """
    heads, query_blocks = kv_num_blocks.shape[1:]
    return kv_num_blocks.sum() / (valid_blocks.sum() * heads * query_blocks)
