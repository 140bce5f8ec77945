"""All options and their checks."""

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass, replace

from .attention.method import NAMES, Method, check_sparsity


@dataclass(frozen=True, kw_only=True)
class DraftConfig(Method):
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
    dense_steps: float | None = None
    dense_timestep: float | None = None
    dense_layers: Iterable[int] | None = None

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        super().__post_init__()
        if self.dense_steps is not None and not 0 <= self.dense_steps <= 1:
            raise ValueError(f"dense_steps is a share of the run and must be in [0, 1], got {self.dense_steps!r}.")
        if self.dense_timestep is not None and math.isnan(self.dense_timestep):
            raise ValueError(f"dense_timestep must be a number, got {self.dense_timestep!r}.")
        if self.dense_layers is not None:
            object.__setattr__(self, "dense_layers", _layer_indices(self.dense_layers))

    @property
    def method(self) -> Method:
        """How blocks are chosen, without which steps and layers are dense."""
        return Method(**{name: getattr(self, name) for name in NAMES})

    @classmethod
    def paper(cls, sparsity: float = 0.9) -> "DraftConfig":
        """Make the settings of the paper's code: the head budget and blocks of 8 x 16 tokens.

        Dense steps and layers are those of the model family.
        """
        return cls(sparsity=sparsity, budget="head", tile=(8, 16))

    @classmethod
    def hunyuan_custom(cls, sparsity: float = 0.9) -> "DraftConfig":
        """Make the settings of the paper's code for HunyuanCustom: dense while the timestep is above 975."""
        return replace(cls.paper(sparsity), dense_timestep=975.0)


def _layer_indices(layers: Iterable[int]) -> tuple[int, ...]:
    layers = tuple(layers)
    try:
        indices = sorted({operator.index(layer) for layer in layers})
    except TypeError:
        indices = [-1]
    if any(index < 0 for index in indices):
        raise ValueError(f"dense_layers must be layer indices from 0 on, got {layers!r}.")
    return tuple(indices)
