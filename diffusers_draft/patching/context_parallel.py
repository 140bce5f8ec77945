"""Reads and checks diffusers' context-parallel config: what draft attention can follow over GPUs."""

import math
from typing import Any

from ..attention.layout import Grid


def context_parallel(parallel_config: Any) -> Any:
    """Get the `ContextParallelConfig` in what a processor or model has as `_parallel_config`, or None."""
    return getattr(parallel_config, "context_parallel_config", None)


def check_config(config: Any, heads: int) -> None:
    """Refuse what draft attention cannot split over GPUs.

    Args:
        config: diffusers' `ContextParallelConfig`.
        heads: of one attention layer.

    Raises:
        NotImplementedError: for ring attention and for uneven shares.
        ValueError: if the ranks cannot share the heads.
    """
    if config.ring_degree not in (None, 1):
        raise NotImplementedError(
            f"Draft attention cannot run with ring attention (ring_degree={config.ring_degree}): no rank sees the "
            "whole sequence, so none can choose the best blocks. Use ContextParallelConfig(ulysses_degree=...) alone."
        )
    if getattr(config, "ulysses_anything", False):
        raise NotImplementedError(
            "Draft attention cannot run with ulysses_anything=True, which gives ranks uneven shares. Leave it out and "
            "choose a size of the video that the ranks can share."
        )
    if heads % config.ulysses_degree:
        degrees = [degree for degree in range(2, heads + 1) if heads % degree == 0]
        raise ValueError(
            f"ulysses_degree={config.ulysses_degree} does not divide the {heads} heads of this model. "
            f"Use one of {', '.join(map(str, degrees))}."
        )


def check_tokens(tokens: int, grid: Grid, degree: int) -> None:
    """Raise ValueError if the ranks cannot share a sequence; it names grids near by that they can.

    Args:
        tokens: that are split.
        grid: `(T, Y, X)` of the video among them.
        degree: number of ranks.
    """
    if tokens % degree == 0:
        return
    others = tokens - math.prod(grid)
    fitting: list[tuple[int, ...]] = []
    for axis in range(3):
        steps = sorted(range(-degree, degree + 1), key=abs)
        near = [(*grid[:axis], grid[axis] + step, *grid[axis + 1 :]) for step in steps if grid[axis] + step > 0]
        fitting += [size for size in near if (math.prod(size) + others) % degree == 0][:1]
    raise ValueError(
        f"{degree} GPUs cannot share {tokens} tokens equally: the video has {_times(grid)} (frames x rows x columns)"
        f"{f' and there are {others} others' if others else ''}. Choose another number of frames, height or width; "
        f"near by {' or '.join(map(_times, fitting)) or 'no size'} would fit."
    )


def _times(grid: tuple[int, ...]) -> str:
    return " x ".join(map(str, grid))
