"""Reads what sparse calls measured and left on their devices."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .records import SparseCall


@dataclass(frozen=True)
class Error:
    """Relative error of an attention output, measured on the probes; NaN, also in means, if the output has NaN.

    Attributes:
        before: of the sparse output, without correction.
        after: of the corrected one, with each probe left out of its own fit. Both are 0 where nothing was skipped.
    """

    before: float
    after: float


class Measured(NamedTuple):
    """What one sparse call measured.

    Attributes:
        density: share of the pairs of blocks that it computed.
        error: None without probes.
    """

    density: float
    error: Error | None


def measured(calls: Sequence[SparseCall], block: int, probed: bool) -> list[Measured]:
    """Read what calls measured, waiting for each device once for each kind of what they left.

    Args:
        calls: in any order.
        block: tokens of a block.
        probed: whether probes measured their errors.
    """
    lengths = iter(_read([call.kv_len for call in calls if call.kv_len is not None]))
    found = []
    for call, pairs, squares in zip(
        calls, _read([call.pairs for call in calls]), _read([call.squares for call in calls]), strict=True
    ):
        heads, blocks = call.facts.tolist()[:2]
        valid = [blocks] * len(pairs) if call.kv_len is None else [-(-length // block) for length in next(lengths)]
        density = sum(pairs) / (sum(valid) * heads * blocks)
        found.append(Measured(density, Error(0.0, 0.0) if probed and density == 1 else _error(*squares)))
    return found


def _read(vectors: Sequence[Tensor]) -> list[list[Any]]:
    """Read vectors of any lengths, those of a device together."""
    found: list[list[Any]] = [[] for _ in vectors]
    for device in {vector.device for vector in vectors}:
        there = [number for number, vector in enumerate(vectors) if vector.device == device]
        values = iter(torch.cat([vectors[number] for number in there]).tolist())
        for number in there:
            found[number] = list(itertools.islice(values, len(vectors[number])))
    return found


def _error(before: float, after: float, whole: float) -> Error | None:
    """Compute relative errors from sums of squares; None where nothing was measured."""
    return Error(math.sqrt(before / whole), math.sqrt(after / whole)) if whole else None
