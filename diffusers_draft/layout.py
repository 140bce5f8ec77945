"""Token order: a latent grid of any size becomes full blocks of compact patches, without padding."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class TokenLayout:
    """Where every token goes when video tokens are put in block order and all other tokens behind them.

    Attributes:
        order: `(S,)` int64, original position of the i-th token in block order.
        inverse: `(S,)` int64, block-order position of the i-th original token.
        seq_len: `S`.
        block: tokens per block.
        num_blocks: `N = ceil(S / block)`; the last block may be short.
        num_video_blocks: `Nv = floor(V / block)`; the blocks from here on are anchors.
    """

    order: Tensor
    inverse: Tensor
    seq_len: int
    block: int
    num_blocks: int
    num_video_blocks: int


def walk(grid: Grid, strip_height: int) -> Tensor:
    """Visits every token of the grid so that any run of consecutive tokens is a compact patch.

    A frame's rows are split into strips of nearly equal height; the walk goes column by column along one strip and
    back along the next. Every other frame is walked backwards, so that a frame begins where the last one ended.

    Args:
        grid: `(T, Y, X)` latent frames, rows and columns in tokens.
        strip_height: the height wanted; the real one is `Y / round(Y / strip_height)`.

    Returns:
        `(T * Y * X,)` int64 raster positions in walking order.
    """
    frames, rows, columns = grid
    frame = torch.arange(rows * columns).view(rows, columns)
    strips = max(1, round(rows / strip_height))
    path = []
    for strip in range(strips):
        by_column = frame[strip * rows // strips : (strip + 1) * rows // strips].T
        path.append((by_column.flip(0) if strip % 2 else by_column).flatten())
    forth = torch.cat(path)
    both_ways = torch.stack([forth, forth.flip(0)])
    first_token = torch.arange(frames) * (rows * columns)
    return (both_ways[torch.arange(frames) % 2] + first_token[:, None]).flatten()


@functools.lru_cache(maxsize=8)  # grids change during a run; those of old ones are let go
def token_layout(grid: Grid, prefix: int, seq_len: int, tile: tuple[int, int], device: torch.device) -> TokenLayout:
    """Builds, once for each set of arguments, the order for `seq_len` tokens of which `grid` start at `prefix`.

    Raises:
        ValueError: if the sequence is too short to hold the grid behind the prefix.
    """
    video = grid[0] * grid[1] * grid[2]
    if prefix + video > seq_len:
        raise ValueError(
            f"The grid (T, Y, X) = {grid} has {video} video tokens behind a prefix of {prefix}, but the sequence has "
            f"only {seq_len} tokens. Pass the grid of tokens (latent frames, rows and columns after patching)."
        )
    block = tile[0] * tile[1]
    # Cached tensors must stay usable under autograd even when the first call runs in inference mode.
    with torch.inference_mode(False):
        order = torch.cat([prefix + walk(grid, tile[0]), torch.arange(prefix), torch.arange(prefix + video, seq_len)])
        return TokenLayout(
            order=order.to(device),
            inverse=torch.argsort(order).to(device),
            seq_len=seq_len,
            block=block,
            num_blocks=-(-seq_len // block),
            num_video_blocks=video // block,
        )
