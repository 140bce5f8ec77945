"""Ulysses: ranks that each hold some tokens of all heads exchange them for all tokens of some heads, and back."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from ...config import DraftConfig
from ..call import fields_of, needs_grad
from ..layout import Grid
from .operators import attend_over_ranks, to_heads, to_tokens


class Exchange:
    """One attention call's way from tokens split over ranks to heads split over ranks.

    Args:
        group: the ranks, in the order of their tokens.
        shared: tokens of the whole sequence that the ranks share.
        whole_text: whether every rank has other tokens behind its own, the same ones.
    """

    def __init__(self, group: dist.ProcessGroup, shared: int, whole_text: bool = False) -> None:
        self.group = group
        self.size = group.size()
        self.shared = shared
        self.whole_text = whole_text

    def to_heads(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Three `(B, S on this rank, H, D)` to three `(B, S, H / ranks, D)`: the same heads of each.

        Raises:
            NotImplementedError: if a gradient is needed.
            RuntimeError: if this rank does not have its share of the tokens.
        """
        whole = to_heads(query, key, value, self.group.group_name, self._tokens(query, key, value))
        return [tensor.transpose(0, 1) for tensor in whole]

    def to_tokens(self, out: Tensor) -> Tensor:
        """`(B, S, H / ranks, D)` to `(B, S on this rank, H, D)`."""
        return to_tokens(out, self.group.group_name, self.size, self.shared // self.size)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        geometry: Tensor,
        kv_len: Tensor | None,
        config: DraftConfig,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `attention.attend`, of this rank's tokens, and `kv_num_blocks` of its heads.

        It equals `to_heads`, `attend` and `to_tokens`, but some heads attend while others are on their way.

        Raises:
            NotImplementedError: if a gradient is needed.
            RuntimeError: if this rank does not have its share of the tokens.
        """
        where = self.group.group_name, self._tokens(query, key, value)
        return attend_over_ranks(query, key, value, *where, geometry, kv_len, *fields_of(config), scale)

    def whole_mask(self, mask: Tensor | None, seq_len: int) -> Tensor | None:
        """The mask of a call as it must be for the whole sequence of `seq_len` tokens.

        Raises:
            NotImplementedError: if it does not speak of the whole sequence.
        """
        if mask is None or mask.shape[-1] == seq_len:
            return mask
        if not self.whole_text or mask.shape[-2] > 1 or mask.dtype != torch.bool:
            raise NotImplementedError(
                f"A mask of shape {tuple(mask.shape)} does not fit the whole sequence of {seq_len} tokens. Draft "
                "attention cannot split this kind of input over GPUs."
            )
        behind = seq_len - self.shared
        return functional.pad(mask[..., mask.shape[-1] - behind :], (self.shared, 0), value=True)

    def _tokens(self, *tensors: Tensor) -> list[int]:
        """How many tokens each rank sends; raises what `to_heads` raises."""
        if needs_grad(*tensors):
            raise NotImplementedError("No gradients flow between GPUs yet: run the transformer under torch.no_grad().")
        split = self.shared // self.size
        here = tensors[0].shape[1]
        behind = here - split
        if behind < 0 or (behind > 0 and not self.whole_text):
            raise RuntimeError(
                f"A GPU has {here} tokens, but its share of {self.shared} tokens is {split}: something "
                "removed diffusers' hooks that split the model's inputs. Split the model before it is offloaded."
            )
        # The last rank sends what is behind the video: it arrives in its place, and nobody has to put it there.
        return [split] * (self.size - 1) + [split + behind]


def context_parallel(parallel_config: Any) -> Any:
    """The `ContextParallelConfig` in what a diffusers processor or model has as `_parallel_config`, or None."""
    return getattr(parallel_config, "context_parallel_config", None)


def check_config(config: Any, heads: int) -> None:
    """Refuses what draft attention cannot split over GPUs.

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
    """Raises ValueError if the ranks cannot share a sequence; names grids near by that they can.

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
