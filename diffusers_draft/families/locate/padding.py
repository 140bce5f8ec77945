"""Lengths of padded text, from its mask."""

import torch
from torch import Tensor

from .reading import read_once


def lengths_of(mask: Tensor) -> Tensor | None:
    """Count the valid tokens of each sample of a `(B, L)` mask; return None unless all are right-padded."""
    return mask.bool().sum(dim=1, dtype=torch.int32) if _is_right_padded(mask) else None


@read_once
def _is_right_padded(mask: Tensor) -> bool:
    valid = mask.bool()
    return not bool((valid[:, 1:] & ~valid[:, :-1]).any())
