"""What may guide the choice of blocks: the draft, and the baselines that it is compared with."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...attention.block_mask import BlockMask
from ...attention.draft import block_means, draft_map
from ...attention.layout import Grid, Tile, TokenLayout
from ...attention.select import select
from ...config import DraftConfig
from .mass import block_mass


@dataclass(frozen=True, kw_only=True)
class Call:
    """One attention call in block order.

    Attributes:
        query: `(B, S, H, D)`.
        key: as `query`.
        grid: `(T, Y, X)` video tokens.
        prefix: position of the first of them in the model's order.
        layout: the block order.
        scale: factor on the scores.
        kv_len: `(B,)` leading valid keys or None.
        tile: `(h, w)` or `(t, h, w)` tokens of a block.
        generator: source of what is random, on the CPU.
    """

    query: Tensor
    key: Tensor
    grid: Grid
    prefix: int
    layout: TokenLayout
    scale: float
    kv_len: Tensor | None
    tile: Tile
    generator: torch.Generator

    def heads(self, heads: list[int]) -> "Call":
        """The same call with some of its heads."""
        return dataclasses.replace(self, query=self.query[:, :, heads], key=self.key[:, :, heads])


Scores = Callable[[Call], Tensor]
"""Makes `(B, H, Nv, Nv)` float32 scores of the pairs of video blocks, all at most 1; the largest are kept."""


def draft(call: Call) -> Tensor:
    """The draft map: what the library does."""
    count, block = call.layout.num_video_blocks, call.layout.block
    return draft_map(block_means(call.query, count, block), block_means(call.key, count, block), call.scale)


def oracle(call: Call) -> Tensor:
    """The true attention mass of every pair: no choice with the same budget keeps more."""
    count = call.layout.num_video_blocks
    return block_mass(call.query, call.key, count, call.layout.block, call.scale, call.kv_len)[..., :count]


def local(call: Call) -> Tensor:
    """A static window: nearness of the blocks' centres, one frame being as far as one block's height or width."""
    _, rows, columns = call.grid
    count = call.layout.num_video_blocks
    raster = (call.layout.order[: count * call.layout.block] - call.prefix).view(count, call.layout.block)
    height, width = call.tile[-2:]
    place = (raster // (rows * columns), raster // columns % rows / height, raster % columns / width)
    centres = torch.stack([axis.float().mean(1) for axis in place], dim=1)
    nearness = -torch.cdist(centres, centres)
    return nearness.expand(call.query.shape[0], call.query.shape[2], count, count).clone()


def random(call: Call) -> Tensor:
    """Any blocks, others in every head and call."""
    count = call.layout.num_video_blocks
    shape = (call.query.shape[0], call.query.shape[2], count, count)
    return torch.rand(shape, generator=call.generator).to(call.query.device)


SELECTIONS: dict[str, Scores] = {"draft": draft, "random": random, "local": local, "oracle": oracle}


def chosen(scores: Tensor, call: Call, config: DraftConfig) -> BlockMask:
    """The blocks that the budget keeps of these scores, with every anchor; as the library chooses from the draft."""
    layout = call.layout
    lengths = {"seq_len": layout.seq_len, "block": layout.block}
    return select(scores.clone(), config.sparsity, config.budget, **lengths, kv_len=call.kv_len)
