"""All options and their checks."""

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Literal

from .attention.method import NAMES, Method, check_sparsity, is_number
from .schedules import SCHEDULES

SPARSITY = 0.8
"""Without other wishes."""

ScheduleName = Literal["falling", "constant", "paper"]


@dataclass(frozen=True, kw_only=True)
class DraftConfig(Method):
    """Settings of draft attention.

    Attributes:
        sparsity: mean share of the pairs of video blocks that a run's sparse steps skip, in [0, 1); 0.8 unless
            `max_error` is given.
        max_error: instead of `sparsity`, the error to arrive at, in (0, 1): the mean over a run's sparse steps of the
            relative error of the corrected attention outputs, as the probes measure it and the report shows it. Before
            each step its density is set from the errors of the steps two before it and earlier.
        schedule: how the density goes over the run: `"falling"` starts denser and ends sparser than that mean, less
            so the fewer the steps, `"constant"`, or `"paper"`: the dense steps and layers of the paper's code for the
            model family, then constant.
        score: what ranks a pair of blocks: `"value"`, the draft's mass times how far the block's mean value lies from
            the output, or `"mass"`, the mass alone (the paper).
        probes: rows of each head whose exact attention is computed to correct the others and to measure the error;
            0 for neither.
        budget: `"row"` keeps the same number of key blocks for every query block; `"head"` the best pairs of each
            head's whole map (the paper).
        tile: `(h, w)` tokens of one frame (the paper), or `(t, h, w)` tokens of several; blocks are patches of about
            this shape. The product must be a multiple of 16, at most 1024.
        dense_steps: share of the run's steps, from its start, that stay dense, in [0, 1]. Overrides `dense_timestep`.
            All of them are 1.0; a 1 is refused, as it may mean one step.
        dense_timestep: steps whose timestep is above this stay dense, in the scheduler's units.
        dense_layers: layers that stay dense, as indices into the model's self-attention layers in execution order.
        backend: `"auto"` or a name from `diffusers_draft.attention.kernels.BACKENDS`.

    Raises:
        ValueError: if an option is out of range; the message says what was expected and what came.
    """

    sparsity: float | None = None
    max_error: float | None = None
    schedule: ScheduleName = "falling"
    dense_steps: float | None = None
    dense_timestep: float | None = None
    dense_layers: Iterable[int] | None = None

    def __post_init__(self) -> None:
        self._check_goal()
        if not isinstance(self.schedule, str) or self.schedule not in SCHEDULES:
            names = ", ".join(map(repr, SCHEDULES))
            raise ValueError(f"Unknown schedule {self.schedule!r}. Expected one of {names}.")
        super().__post_init__()
        if self.dense_steps is not None:
            object.__setattr__(self, "dense_steps", _share(self.dense_steps))
        if self.dense_timestep is not None and not is_number(self.dense_timestep):
            raise ValueError(f"dense_timestep must be a number that a float can hold, got {self.dense_timestep!r}.")
        if self.dense_layers is not None:
            object.__setattr__(self, "dense_layers", _layer_indices(self.dense_layers))

        if self.max_error is not None and not self.probes:
            raise ValueError(f"max_error={self.max_error:g} is measured on probes, so that probes=0 cannot be given.")

    def _check_goal(self) -> None:
        if self.max_error is None:
            sparsity = SPARSITY if self.sparsity is None else self.sparsity
            check_sparsity(sparsity)
            object.__setattr__(self, "sparsity", float(sparsity))
            return
        if self.sparsity is not None:
            raise ValueError(
                f"Give sparsity or max_error and leave the other None, got sparsity={self.sparsity!r}, "
                f"max_error={self.max_error!r}."
            )
        if not is_number(self.max_error) or not 0 < float(self.max_error) < 1:
            raise ValueError(f"max_error is a relative error and must be in (0, 1), got {self.max_error!r}.")
        object.__setattr__(self, "max_error", float(self.max_error))

    @property
    def known_sparsity(self) -> float:
        """`sparsity`, for what has no run that could settle it.

        Raises:
            ValueError: with `max_error`.
        """
        if self.sparsity is None:
            raise ValueError(f"max_error={self.max_error} settles the sparsity in a run. Give sparsity here.")
        return self.sparsity

    @property
    def method(self) -> Method:
        """How blocks are chosen and corrected, without how many and where."""
        return Method(**{name: getattr(self, name) for name in NAMES})

    @classmethod
    def paper(cls, sparsity: float = 0.9) -> "DraftConfig":
        """Make the settings of the paper's code: its schedule, score, budget and blocks of 8 x 16, no correction."""
        return cls(sparsity=sparsity, schedule="paper", score="mass", probes=0, budget="head", tile=(8, 16))

    @classmethod
    def hunyuan_custom(cls, sparsity: float = 0.9) -> "DraftConfig":
        """Make the settings of the paper's code for HunyuanCustom: dense while the timestep is above 975."""
        return replace(cls.paper(sparsity), dense_timestep=975.0)


def parse_share(text: str) -> float:
    """Read a share of a run. A whole number stays one: `DraftConfig` tells 1 from 1.0.

    Raises:
        ValueError: if that is not what the text is.
    """
    return int(text) if text.strip().isdecimal() else float(text)


def parse_layers(text: str) -> tuple[int, ...]:
    """Read layer indices: `0+1` are two layers and `none` is no layer.

    Raises:
        ValueError: if that is not what the text is.
    """
    indices = [] if text == "none" else text.split("+")
    if not all(index.isdecimal() for index in indices):
        raise ValueError("expected indices joined by +, as in 0+1, or none")
    return tuple(map(int, indices))


def _share(steps: Any) -> float:
    # A whole number may mean so many steps; 0 is the same either way.
    counts_steps = isinstance(steps, Integral) and steps != 0
    if not is_number(steps) or counts_steps or not 0 <= steps <= 1:
        raise ValueError(
            f"dense_steps is a share of the run and must be in [0, 1], got {steps!r}. For one step of 50 give 0.02, "
            "for all of them 1.0."
        )
    return float(steps)


def _layer_indices(layers: Iterable[int]) -> tuple[int, ...]:
    try:
        if isinstance(layers, (Mapping, bytes, bytearray)):
            raise TypeError
        # Elements of a bool tensor are not bools.
        layers = tuple(layers.tolist() if hasattr(layers, "tolist") else layers)
        indices = sorted({-1 if isinstance(layer, bool) else operator.index(layer) for layer in layers})
    except TypeError:
        indices = [-1]
    if any(index < 0 for index in indices):
        raise ValueError(f"dense_layers must be layer indices from 0 on, as in (0, 1), got {layers!r}.")
    return tuple(indices)
