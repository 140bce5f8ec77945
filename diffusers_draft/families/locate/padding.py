"""Masks over text, which give lengths where valid tokens come first."""

import torch
from torch import Tensor

from .reading import read_once


def lengths_of(mask: Tensor) -> Tensor | None:
    """The `(B,)` numbers of valid tokens of a `(B, L)` mask; None where some sample's do not all come first."""
    return mask.bool().sum(dim=1, dtype=torch.int32) if _is_right_padded(mask) else None


@read_once
def _is_right_padded(mask: Tensor) -> bool:
    valid = mask.bool()
    return not bool((valid[:, 1:] & ~valid[:, :-1]).any())
