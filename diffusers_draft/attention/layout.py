"""Token order: a latent grid of any size becomes full blocks of compact patches, without padding."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Grid = tuple[int, int, int]
Tile = tuple[int, ...]
"""`(h, w)` rows and columns of tokens, or `(t, h, w)` with frames."""


@dataclass(frozen=True)
class TokenLayout:
    """Where every token goes when video tokens are put in block order and all other tokens behind them.

    Attributes:
        grid: `(T, Y, X)` video tokens.
        prefix: position of the first of them in the original order.
        order: `(S,)` int64, original position of the i-th token in block order.
        inverse: `(S,)` int64, block-order position of the i-th original token.
        seq_len: `S`.
        block: tokens per block.
        num_blocks: `N = ceil(S / block)`; the last block may be short.
        num_video_blocks: `Nv = floor(V / block)`; the blocks from here on are anchors.
    """

    grid: Grid
    prefix: int
    order: Tensor
    inverse: Tensor
    seq_len: int
    block: int
    num_blocks: int
    num_video_blocks: int


def walk(grid: Grid, tile: Tile) -> Tensor:
    """Visit every token of the grid so that any run of consecutive tokens is a compact patch.

    Frames are split into slabs of nearly equal depth, of one frame where the tile has no depth, and the rows of a slab
    into strips of nearly equal height. The walk goes column by column along one strip and back along the next. Every
    other slab is walked backwards, so that a slab begins where the last one ended.

    Args:
        grid: `(T, Y, X)` latent frames, rows and columns in tokens.
        tile: the depth and the height wanted; the real ones are `T / round(T / depth)` and `Y / round(Y / height)`.

    Returns:
        `(T * Y * X,)` int64 raster positions in walking order.
    """
    depth, height = (1, *tile)[-3:-1]
    path = []
    for number, slab in enumerate(_parts(torch.arange(math.prod(grid), device="cpu").view(grid), depth, dim=0)):
        strips = _parts(slab, height, dim=1)
        forth = [(strip.flip(2) if back % 2 else strip).permute(2, 0, 1) for back, strip in enumerate(strips)]
        along = torch.cat([strip.flatten() for strip in forth])
        path.append(along.flip(0) if number % 2 else along)
    return torch.cat(path)


def _parts(tokens: Tensor, size: int, dim: int) -> Sequence[Tensor]:
    """Cut into `round(length / size)` parts of nearly equal length."""
    length = tokens.shape[dim]
    count = max(1, round(length / size))
    return tokens.tensor_split([part * length // count for part in range(1, count)], dim)


@functools.lru_cache(maxsize=8)  # grids change during a run; those of old ones are let go
def token_layout(grid: Grid, prefix: int, seq_len: int, tile: Tile, device: torch.device) -> TokenLayout:
    """Build, once for each set of arguments, the order for `seq_len` tokens of which `grid` start at `prefix`.

    Raises:
        ValueError: if the sequence is too short to hold the grid behind the prefix.
    """
    video = grid[0] * grid[1] * grid[2]
    if prefix + video > seq_len:
        raise ValueError(
            f"The grid (T, Y, X) = {grid} has {video} video tokens behind a prefix of {prefix}, but the sequence has "
            f"only {seq_len} tokens. Pass tensors (B, S, H, D) and the grid of tokens (latent frames, rows and "
            "columns after patching)."
        )
    block = math.prod(tile)
    # Cached tensors must stay usable under autograd even when the first call runs in inference mode.
    with torch.inference_mode(False):
        others = (torch.arange(*bounds, device="cpu") for bounds in ((0, prefix), (prefix + video, seq_len)))
        order = torch.cat([prefix + walk(grid, tile), *others])
        return TokenLayout(
            grid=grid,
            prefix=prefix,
            order=order.to(device),
            inverse=torch.argsort(order).to(device),
            seq_len=seq_len,
            block=block,
            num_blocks=-(-seq_len // block),
            num_video_blocks=video // block,
        )
