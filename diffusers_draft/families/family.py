"""Types that describe a family of transformers and the video tokens of one of its forwards."""

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..attention.layout import Grid

Inputs = dict[str, Any]
"""Arguments of one transformer forward, by parameter name."""


@functools.cache
def parameter_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """List the parameter names of a module class's `forward`, without `self`."""
    return tuple(inspect.signature(forward).parameters)[1:]


def inputs_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
    """Map the positional and keyword arguments of a forward to parameter names.

    Raises:
        TypeError: for positional arguments of a forward that does not name its parameters.
    """
    return dict(zip(_positional_names(type(module)), args, strict=False)) | kwargs if args else kwargs


def _positional_names(cls: type[nn.Module]) -> tuple[str, ...]:
    """List the parameter names of a module's `forward`, or of the one that a `forward(*args, **kwargs)` hides."""
    for base in cls.__mro__:
        forward = vars(base).get("forward")
        if forward is not None and not _takes_anything(forward):
            return parameter_names(forward)
    raise TypeError(
        f"The forward of {cls.__name__} takes *args and does not say what they are, so draft attention cannot find "
        "the video in them. Give it keyword arguments, or put functools.wraps on what replaced its forward."
    )


@functools.cache
def _takes_anything(forward: Callable[..., Any]) -> bool:
    parameters = inspect.signature(forward).parameters.values()
    return any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)


@dataclass(frozen=True, kw_only=True)
class VideoTokens:
    """Where one forward's video tokens lie in the sequence that self-attention sees.

    Attributes:
        grid: `(T, Y, X)` video tokens, in raster order.
        prefix: number of tokens in front of them.
        kv_len: `(B,)` leading valid keys of each sample, on the inputs' device; None if nothing is padded.
    """

    grid: Grid
    prefix: int = 0
    kv_len: Tensor | None = None


def anything(config: Any) -> None:
    """Accept any config: the check of families that need none."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """How the tokens of one forward are split over GPUs (Ulysses).

    Attributes:
        plan: makes diffusers' context-parallel plan, which says what is split and gathered at which module, from the
            model's config.
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
    """Everything that draft attention needs to know about one transformer class.

    Attributes:
        name: the name in the report and in the table of models.
        layers: module paths of the video self-attention layers with `*` for the index, in execution order.
        processors: class names of their stock processors, which must end in `dispatch_attention_fn` or
            `F.scaled_dot_product_attention`.
        explicit: a `__call__` to run instead of theirs, which ends in `dispatch_attention_fn`. It must follow changes
            of upstream's, which tests/families/test_explicit.py detects.
        stock_when_dense: whether dense forwards run upstream's `__call__` instead of `explicit`, unless a hook looks
            into them.
        video: finds the video tokens from the inputs of a forward and the model's config.
        check: raises ValueError for a model whose config gives it self-attention that cannot be made sparse.
        dense_layers: module paths of the layers that stay dense with `schedule="paper"`.
        dense_timestep: steps above this timestep stay dense with `schedule="paper"`.
        dense_steps: share of a run's steps, from its start, that stay dense with `schedule="paper"`; for families
            without a `dense_timestep`. Needs the pipeline: with a transformer alone no step is dense then.
        top_timestep: the timestep of pure noise, for a transformer without a pipeline; None where timesteps do not
            tell the noise.
        scheduler_units: whether the model gets timesteps in the units of its scheduler.
        split: how to split the tokens over GPUs, or why that is impossible.
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
