"""All options and their checks."""

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Literal

from .attention.kernels import check_name
from .attention.layout import Tile
from .attention.select import BUDGETS

Budget = Literal["head", "row"]


@dataclass(frozen=True, kw_only=True)
class DraftConfig:
    """Settings of draft attention. `None` means the default of the model family.

    Attributes:
        sparsity: share of the video block pairs to skip, in [0, 1). The paper uses 0.9 for HunyuanVideo and 0.75
            for Wan.
        budget: `"row"` keeps the same number of key blocks for every query block; `"head"` the best pairs of each
            head's whole map (the paper).
        tile: `(h, w)` tokens of one frame (the paper), or `(t, h, w)` tokens of several; blocks are patches of about
            this shape. The product must be a multiple of 16.
        dense_steps: share of the run's steps, from its start, that stay dense, in [0, 1]. Overrides `dense_timestep`.
        dense_timestep: steps whose timestep is above this stay dense, in the scheduler's units.
        dense_layers: layers that stay dense, as indices into the model's self-attention layers in execution order.
        backend: `"auto"` or a name from `diffusers_draft.attention.kernels.BACKENDS`.

    Raises:
        ValueError: if an option is out of range; the message says what was expected and what came.
    """

    sparsity: float = 0.9
    budget: Budget = "row"
    tile: Tile = (2, 8, 8)
    dense_steps: float | None = None
    dense_timestep: float | None = None
    dense_layers: Iterable[int] | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {self.sparsity!r}. Use 0.9 to skip 90 % of the pairs.")
        if self.budget not in BUDGETS:
            raise ValueError(f"Unknown budget {self.budget!r}. Expected one of {', '.join(map(repr, BUDGETS))}.")
        if not (_are_counts(self.tile, 2) or _are_counts(self.tile, 3)) or math.prod(self.tile) % 16:
            raise ValueError(
                "tile must be (height, width) or (frames, height, width), their product a multiple of 16 tokens, got "
                f"{self.tile!r}. The paper uses (8, 16)."
            )
        if self.dense_steps is not None and not 0 <= self.dense_steps <= 1:
            raise ValueError(f"dense_steps is a share of the run and must be in [0, 1], got {self.dense_steps!r}.")
        if self.dense_timestep is not None and math.isnan(self.dense_timestep):
            raise ValueError(f"dense_timestep must be a number, got {self.dense_timestep!r}.")
        check_name(self.backend)
        object.__setattr__(self, "tile", tuple(map(operator.index, self.tile)))
        if self.dense_layers is not None:
            object.__setattr__(self, "dense_layers", _layer_indices(self.dense_layers))

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return math.prod(self.tile)

    @classmethod
    def paper(cls, sparsity: float = 0.9) -> "DraftConfig":
        """Settings of the paper's code: the head budget and blocks of 8 x 16 tokens.

        Dense steps and layers are those of the model family.
        """
        return cls(sparsity=sparsity, budget="head", tile=(8, 16))

    @classmethod
    def hunyuan_custom(cls, sparsity: float = 0.9) -> "DraftConfig":
        """Settings of the paper's code for HunyuanCustom: dense while the timestep is above 975."""
        return replace(cls.paper(sparsity), dense_timestep=975.0)


def parse_tile(text: str) -> Tile:
    """Reads a tile such as `"2x8x8"`.

    Raises:
        ValueError: if that is not what the text is.
    """
    sizes = text.split("x")
    if not all(size.isdecimal() for size in sizes):
        raise ValueError(f"A tile is numbers of tokens joined by x, as in 2x8x8, got {text!r}.")
    return tuple(map(int, sizes))


def format_tile(tile: Tile) -> str:
    """Writes a tile as `parse_tile` reads it."""
    return "x".join(map(str, tile))


def check_grid(grid: tuple[int, int, int], prefix: int) -> None:
    """Raises ValueError for a grid that is not three positive counts, or a negative prefix."""
    if not _are_counts(grid, 3):
        raise ValueError(f"grid must be (T, Y, X): positive numbers of frames, rows and columns, got {grid!r}.")
    if prefix < 0:
        raise ValueError(f"prefix is the position of the first video token and must not be negative, got {prefix!r}.")


def _layer_indices(layers: Iterable[int]) -> tuple[int, ...]:
    layers = tuple(layers)
    try:
        indices = sorted({operator.index(layer) for layer in layers})
    except TypeError:
        indices = [-1]
    if any(index < 0 for index in indices):
        raise ValueError(f"dense_layers must be layer indices from 0 on, got {layers!r}.")
    return tuple(indices)


def _are_counts(values: tuple[int, ...], length: int) -> bool:
    # `int` comes first: under torch.compile a size is one, and nothing here may make it a constant.
    if not isinstance(values, Sequence) or len(values) != length:
        return False
    return all(isinstance(value, (int, Integral)) and value > 0 for value in values)
