"""Scores that guide the choice of blocks: the draft map, and the baselines it is compared with."""

from collections.abc import Callable

import torch
from torch import Tensor

from ...attention.call import Call
from ...attention.ops import Attended, attend_by
from ...patching.forward import AttentionCall, Hook
from .mass import block_mass

Scores = Callable[[Call, torch.Generator], Tensor]
"""Function to `(B, H, Nv, Nv)` float32 scores of pairs of video blocks; the largest are kept."""


def draft(call: Call, generator: torch.Generator) -> Tensor:
    """Score as the library does."""
    return call.scores()


def oracle(call: Call, generator: torch.Generator) -> Tensor:
    """Score by the true attention mass of every pair, which no choice of the same budget can exceed."""
    count = call.layout.num_video_blocks
    return block_mass(call.query, call.key, count, call.layout.block, call.scale, call.kv_len)[..., :count]


def local(call: Call, generator: torch.Generator) -> Tensor:
    """Score by nearness of block centres (a static window), counted in tiles."""
    layout = call.layout
    _, rows, columns = layout.grid
    count = layout.num_video_blocks
    raster = (layout.order[: count * layout.block] - layout.prefix).view(count, layout.block)
    depth, height, width = (1, *call.method.tile)[-3:]
    place = (raster // (rows * columns) / depth, raster // columns % rows / height, raster % columns / width)
    centres = torch.stack([axis.float().mean(1) for axis in place], dim=1)
    nearness = -torch.cdist(centres, centres)
    return nearness.expand(call.query.shape[0], call.query.shape[2], count, count)


def random(call: Call, generator: torch.Generator) -> Tensor:
    """Score at random, independently for every head and call."""
    count = call.layout.num_video_blocks
    shape = (call.query.shape[0], call.query.shape[2], count, count)
    return torch.rand(shape, generator=generator).to(call.query.device)


SELECTIONS: dict[str, Scores] = {"draft": draft, "random": random, "local": local, "oracle": oracle}
"""Name -> scores."""


def selecting(selection: str, seed: int) -> Hook:
    """Make a hook that chooses blocks by one of `SELECTIONS`; for models that are not compiled.

    Args:
        selection: key of `SELECTIONS`.
        seed: seed of random scores.
    """
    generator = torch.Generator().manual_seed(seed)

    def attend(seen: AttentionCall) -> Attended | None:
        if not seen.sparse:
            return None
        return attend_by(lambda call: SELECTIONS[selection](call, generator), *seen.arguments)

    return attend
