"""How attention calls are made sparse: everything that does not change from step to step."""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import Tensor

from .draft import SCORES
from .kernels import check_name
from .layout import Tile
from .select import BUDGETS

Budget = Literal["head", "row"]
Score = Literal["value", "mass"]

TEXT_LENGTH = 128
"""Bytes of a method's text as a tensor. One length for all: compiled code is tied to a shape."""

LARGEST_BLOCK = 1024
"""Most tokens of a block. The memory of a backend's check against dense attention grows with its square."""

LARGEST_COUNT = 2**31 - 1
"""Of rows, tokens and frames: kernels count in 32 bits."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """Settings of the method.

    Attributes:
        score: what ranks a pair of blocks: `"value"`, the draft's mass times how far the block's mean value lies from
            the output, or `"mass"`, the mass alone (the paper).
        probes: rows of each head whose exact attention is computed to correct the others and to measure the error;
            0 for neither.
        budget: `"row"` keeps the same number of key blocks for every query block; `"head"` the best pairs of each
            head's whole map (the paper).
        tile: `(h, w)` tokens of one frame (the paper), or `(t, h, w)` tokens of several; blocks are patches of about
            this shape. The product must be a multiple of 16, at most 1024.
        backend: `"auto"` or a name from `diffusers_draft.attention.kernels.BACKENDS`.

    Raises:
        ValueError: if an option is out of range; the message says what was expected and what came.
    """

    score: Score = "value"
    probes: int = 64
    budget: Budget = "row"
    tile: Tile = (4, 4, 8)
    backend: str = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.score, str) or self.score not in SCORES:
            raise ValueError(f"Unknown score {self.score!r}. Expected one of {', '.join(map(repr, SCORES))}.")
        if not is_count(self.probes, least=0):
            raise ValueError(
                f"probes must be a whole number of rows below 2**31, 0 for no correction, got {self.probes!r}. The "
                "default is 64."
            )
        object.__setattr__(self, "probes", operator.index(self.probes))
        if not isinstance(self.budget, str) or self.budget not in BUDGETS:
            raise ValueError(f"Unknown budget {self.budget!r}. Expected one of {', '.join(map(repr, BUDGETS))}.")
        are_sizes = are_counts(self.tile, 2) or are_counts(self.tile, 3)
        if are_sizes:
            object.__setattr__(self, "tile", tuple(map(operator.index, self.tile)))
        if not are_sizes or self.block % 16:
            raise ValueError(
                "tile must be (height, width) or (frames, height, width), their product a multiple of 16 tokens, got "
                f"{self.tile!r}. The paper uses (8, 16)."
            )
        if self.block > LARGEST_BLOCK:
            raise ValueError(
                f"tile must have at most {LARGEST_BLOCK} tokens, got {self.tile!r} with {self.block}. Choose a "
                "smaller one, for example (4, 4, 8)."
            )
        check_name(self.backend)

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return math.prod(self.tile)

    def to_text(self) -> str:
        """Write the settings as one line that `from_text` reads."""
        return " ".join(f"{name}={_write(getattr(self, name))}" for name in NAMES)

    @classmethod
    def from_text(cls, text: str) -> "Method":
        """Read what `to_text` wrote."""
        items = (item.partition("=") for item in text.split())
        values: dict[str, Any] = {name: _READERS.get(name, str)(value) for name, _, value in items}
        return cls(**values)

    def to_tensor(self) -> Tensor:
        """Write the text as `(TEXT_LENGTH,)` uint8 on the CPU, for operators that must take any method."""
        text = self.to_text()
        assert len(text) <= TEXT_LENGTH, "or compiled code would be tied to this method's length"
        return torch.tensor([ord(letter) for letter in text.ljust(TEXT_LENGTH)], dtype=torch.uint8, device="cpu")

    @classmethod
    def from_tensor(cls, text: Tensor) -> "Method":
        """Read what `to_tensor` wrote."""
        return _from_bytes(bytes(text.tolist()))


NAMES = tuple(field.name for field in dataclasses.fields(Method))
"""Of all settings of a method."""


@functools.lru_cache(maxsize=64)
def _from_bytes(text: bytes) -> Method:
    return Method.from_text(text.decode())


def _write(value: Any) -> str:
    return format_tile(value) if isinstance(value, tuple) else str(value)


def parse_tile(text: str) -> Tile:
    """Read a tile such as `"2x8x8"`.

    Raises:
        ValueError: if that is not what the text is.
    """
    sizes = text.split("x")
    if not all(size.isdecimal() for size in sizes):
        raise ValueError(f"A tile is numbers of tokens joined by x, as in 2x8x8, got {text!r}.")
    return tuple(map(int, sizes))


_READERS: dict[str, Callable[[str], Any]] = {"tile": parse_tile, "probes": int}


def format_tile(tile: Tile) -> str:
    """Write a tile as `parse_tile` reads it."""
    return "x".join(map(str, tile))


def check_sparsity(sparsity: float) -> None:
    """Raise ValueError unless the sparsity is a number in [0, 1)."""
    if not is_number(sparsity) or not 0 <= float(sparsity) < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity!r}. Use 0.9 to skip 90 % of the pairs.")


def check_grid(grid: tuple[int, int, int], prefix: int) -> None:
    """Raise ValueError for a grid that is not three positive counts below 2**31, or a prefix that is no such count."""
    if not are_counts(grid, 3):
        raise ValueError(
            f"grid must be (T, Y, X): positive numbers of frames, rows and columns below 2**31, got {grid!r}."
        )
    if not is_count(prefix, least=0):
        raise ValueError(
            f"prefix is the position of the first video token, a whole number from 0 on below 2**31, got {prefix!r}."
        )


def check_scale(scale: float | None) -> None:
    """Raise ValueError for a scale that is no finite number above 0."""
    if scale is not None and not (is_number(scale) and 0 < scale < math.inf):
        raise ValueError(f"scale is a factor on the scores and must be a finite number above 0, got {scale!r}.")


def is_number(value: Any) -> bool:
    """Return True for a real number that a float holds, infinite or not."""
    try:
        return _is_real(value) and not math.isnan(value)
    except OverflowError:
        return False


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def is_count(value: Any, least: int = 1) -> bool:
    """Return True for a whole number from `least` on that tensors can be as long as."""
    # `int` comes first: under torch.compile a size is one, and nothing here may make it a constant.
    whole = isinstance(value, (int, Integral)) and not isinstance(value, bool)
    return whole and least <= value <= LARGEST_COUNT


def are_counts(values: tuple[int, ...], length: int) -> bool:
    """Return True for so many positive whole numbers."""
    return isinstance(values, Sequence) and len(values) == length and all(map(is_count, values))
