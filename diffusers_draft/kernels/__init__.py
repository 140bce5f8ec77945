"""Backends: the contract, their names, which of them can run here, and the one that is used.

A backend is a module of this package with
`forward(query, key, value, mask, scale) -> out`, where the tensors are `(B, S, H, D)` in block order and contiguous,
`mask` is a `BlockMask` and the result is softmax attention over the kept blocks and valid keys alone.
"""

import functools
import importlib
import logging
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..block_mask import BlockMask
from . import probe

logger = logging.getLogger(__name__)

BACKENDS = ("reference", "torch", "flex")
AUTO = {"cuda": ("flex", "torch"), "cpu": ("torch",)}
"""Backends that `"auto"` tries on each type of device, fastest first."""


class Forward(Protocol):
    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float) -> Tensor: ...


@dataclass(frozen=True)
class Choice:
    """The backend of a call and why it was chosen."""

    name: str
    reason: str
    forward: Forward


def check_name(name: str) -> None:
    """Raises ValueError for a backend that does not exist."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"Unknown backend {name!r}. Expected 'auto' or one of {', '.join(map(repr, BACKENDS))}.")


@functools.lru_cache(maxsize=64)
def choose(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, block: int) -> Choice:
    """Returns the backend for these calls after a one-off check of its numbers.

    Raises:
        ValueError: if there is no backend of that name.
        ImportError: if the backend's package is missing.
        RuntimeError: if the backend cannot run here or fails the check.
    """
    check_name(name)
    if name != "auto":
        return Choice(name, "asked for", _checked(name, device, dtype, head_dim, block))
    refused = []
    for candidate in AUTO.get(device.type, ("torch",)):
        try:
            forward = _checked(candidate, device, dtype, head_dim, block)
        except (ImportError, RuntimeError) as error:
            refused.append(f"{candidate}: {error}")
            continue
        reason = f"fastest that works on {device.type} in {dtype} with head_dim {head_dim}"
        reason += f" (refused: {'; '.join(refused)})" if refused else ""
        logger.info("diffusers_draft runs backend %r: %s", candidate, reason)
        return Choice(candidate, reason, forward)
    raise RuntimeError(f"No backend can run on {device} in {dtype} with head_dim {head_dim}: {'; '.join(refused)}")


def _checked(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, block: int) -> Forward:
    forward = importlib.import_module(f".{name}", __name__).forward
    if name != "reference":
        probe.check(name, forward, device, dtype, head_dim, block)
    return forward
