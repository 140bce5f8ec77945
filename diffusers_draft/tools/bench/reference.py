"""What is measured, and rows of its result computed in float64, which every result is compared with."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...attention.block_mask import BlockMask
from ...attention.correct import Correction
from ...attention.layout import TokenLayout
from .shapes import Shape

Expected = list[tuple[tuple[Any, ...], Tensor]]
"""Indices into a `(B, S, H, D)` result and the float32 values expected there, computed in float64."""

VIDEO_ROWS = 64
"""Video rows of each head on which a result is compared with dense attention."""


@dataclass(frozen=True)
class Case:
    """Query, key and value of one shape, `(B, S, H, D)` each, and the least time to measure, in seconds."""

    shape: Shape
    tensors: tuple[Tensor, ...]
    seconds: float

    @property
    def scale(self) -> float:
        return self.shape.head_dim**-0.5

    @cached_property
    def dense_blocks(self) -> Expected:
        """Dense attention of sampled runs of 128 rows, text among them."""
        return [
            (where, _attend_row(self, where, slice(None)))
            for sample, head, row in _sampled_blocks(self, -(-self.shape.seq_len // 128))
            for where in [(sample, slice(row * 128, (row + 1) * 128), head)]
        ]

    @cached_property
    def dense_video(self) -> Expected:
        """Dense attention of scattered video rows of every head: the same for all that is compared with it."""
        generator = torch.Generator().manual_seed(0)
        device, sample = self.tensors[0].device, self.shape.batch - 1
        drawn = torch.randint(self.shape.video, (self.shape.heads, VIDEO_ROWS), generator=generator)
        places = [(sample, rows.to(device), head) for head, rows in enumerate(drawn)]
        return [(where, _attend_row(self, where, slice(None))) for where in places]


def sparse_blocks(case: Case, layout: TokenLayout, mask: BlockMask, correction: Correction | None) -> Expected:
    """Compute attention of sampled query blocks to the keys that the mask keeps, and correct it."""
    expected = []
    for sample, head, row in _sampled_blocks(case, mask.kv_num_blocks.shape[-1]):
        kept = mask.kv_indices[sample, head, row, : mask.kv_num_blocks[sample, head, row]].long()
        keys = (kept[:, None] * mask.block + torch.arange(mask.block, device=kept.device)).flatten()
        where = (sample, layout.order[row * mask.block : (row + 1) * mask.block], head)
        rows = _attend_row(case, where, layout.order[keys[keys < mask.seq_len]])
        if correction is not None and row < mask.num_video_blocks:
            rows = rows + rows @ correction.matrix[sample, head] + correction.offset[sample, head]
        expected.append((where, rows))
    return expected


def relative_error(out: Tensor, expected: Expected) -> float:
    """Compute the root of the summed squared differences over that of the summed squares expected."""
    difference = sum(float((out[where].float() - rows).square().sum()) for where, rows in expected)
    return (difference / sum(float(rows.square().sum()) for _, rows in expected)) ** 0.5


def _sampled_blocks(case: Case, num_blocks: int) -> Iterator[tuple[int, int, int]]:
    """Sample (batch index, head, query block): the first block, the last one and six random ones."""
    generator = torch.Generator().manual_seed(0)
    for row in [0, num_blocks - 1, *torch.randint(num_blocks, (6,), generator=generator).tolist()]:
        yield case.shape.batch - 1, int(torch.randint(case.shape.heads, (1,), generator=generator)), row


def _attend_row(case: Case, where: tuple[Any, ...], keys: Any) -> Tensor:
    query, key, value = case.tensors
    sample, _, head = where
    scores = query[where].double() @ key[sample, keys, head].double().T * case.scale
    return (torch.softmax(scores, dim=-1) @ value[sample, keys, head].double()).float()
