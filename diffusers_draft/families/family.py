"""What is said of a family of transformers, and of one forward of it."""

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..attention.layout import Grid

Inputs = dict[str, Any]
"""Arguments of one transformer forward, by name."""


@functools.cache
def parameter_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """List the arguments that the `forward` of a module's class takes, without `self`."""
    return tuple(inspect.signature(forward).parameters)[1:]


def inputs_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
    """Name the arguments that a forward pre-hook gets."""
    return dict(zip(parameter_names(type(module).forward), args, strict=False)) | kwargs


@dataclass(frozen=True, kw_only=True)
class VideoTokens:
    """Where one forward's video tokens lie in the sequence that self-attention sees.

    Attributes:
        grid: `(T, Y, X)` tokens, in raster order.
        prefix: tokens in front of them.
        kv_len: `(B,)` leading valid keys of each sample, on the inputs' device; None where nothing is padded.
    """

    grid: Grid
    prefix: int = 0
    kv_len: Tensor | None = None


def anything(config: Any) -> None:
    """Accept any config: for families of which every one can be sparse."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """How the tokens of one forward are split over GPUs (Ulysses).

    Attributes:
        plan: diffusers' context-parallel plan, from the model's config: what is split and gathered at which module.
        whole_text: whether the tokens behind the video in its self-attention stay whole on every rank.
        others: paths of other attention layers whose keys are split, with `*` for the index; diffusers' own exchange
            serves them.
        check: raises ValueError for a model whose config cannot be split.
    """

    plan: Callable[[Any], dict[str, Any]]
    whole_text: bool = False
    others: tuple[str, ...] = ()
    check: Callable[[Any], None] = anything


@dataclass(frozen=True)
class Refusal:
    """Why a family cannot be split over GPUs."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Family:
    """What differs between transformer classes.

    Attributes:
        name: for people.
        layers: module paths of the video self-attention layers with `*` for the index, in execution order.
        processors: class names of their stock processors, which must end in `dispatch_attention_fn` or
            `F.scaled_dot_product_attention`.
        explicit: a `__call__` to run instead of theirs, which ends in `dispatch_attention_fn`; it must keep up with
            upstream's, and tests/test_explicit.py watches that.
        stock_when_dense: whether dense forwards run upstream's `__call__` all the same.
        video: finds the video tokens from the inputs of a forward and the model's config.
        check: raises ValueError for a model whose config makes its self-attention something else.
        dense_layers: module paths of the layers that stay dense by default.
        dense_timestep: steps above this timestep stay dense by default.
        dense_steps: share of a run's steps, from its start, that stays dense by default where no timestep is known
            to be best; a transformer without a pipeline does not know its run, and no step of it is dense then.
        top_timestep: the timestep of pure noise, for a transformer without a pipeline; None where timesteps do not
            tell the noise.
        scheduler_units: whether the model gets timesteps as its scheduler counts them.
        split: how to split it over GPUs, or why that does not work.
    """

    name: str
    layers: tuple[str, ...]
    processors: tuple[str, ...]
    explicit: Callable[..., Any] | None = None
    stock_when_dense: bool = False
    video: Callable[[Inputs, Any], VideoTokens]
    check: Callable[[Any], None] = anything
    dense_layers: tuple[str, ...]
    dense_timestep: float = math.inf
    dense_steps: float | None = None
    top_timestep: float | None = 1000.0
    scheduler_units: bool = True
    split: Split | Refusal
