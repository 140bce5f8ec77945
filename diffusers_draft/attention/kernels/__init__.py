"""Backends: the contract, their names, which of them can run here, and the one that is used.

A backend is a module of this package with
`forward(query, key, value, mask, scale) -> out`, where the tensors are `(B, S, H, D)` in block order with a last
stride of 1, `mask` is a `BlockMask` and the result is softmax attention over the kept blocks and valid keys alone.
One that cannot run everywhere has `refusal(device, dtype, head_dim, block)`, which returns the reason or None.
"""

import functools
import importlib
import logging
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from ..block_mask import BlockMask
from . import probe

logger = logging.getLogger(__name__)

BACKENDS = ("reference", "torch", "flex", "triton", "fa4", "block_sparse_attn")
MODULES = {"torch": "gather", "triton": "triton_lists", "block_sparse_attn": "mit"}
"""Files of backends that have the name of the package they import."""

AUTO = {"cuda": ("fa4", "triton", "flex", "torch"), "cpu": ("torch",)}
"""Backends that `"auto"` tries on each type of device, fastest first."""

WITH_BACKWARD = ("reference", "torch")
"""Backends that gradients flow through. The others would cut the graph without a word."""

PACKAGES = {
    "triton": "triton 3.4 or later, which comes with torch for Linux",
    "fa4": "flash-attn-4: pip install 'diffusers-draft[fa4]'",
    "block_sparse_attn": "block_sparse_attn 0.0.2 or later, built from github.com/mit-han-lab/Block-Sparse-Attention",
}


class Forward(Protocol):
    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float) -> Tensor: ...


@dataclass(frozen=True)
class Choice:
    """The backend of a call and why it was chosen."""

    name: str
    reason: str
    forward: Forward


_choices: list[Choice] = []


def number_of(choice: Choice) -> int:
    """Assign a number to a choice, so that a tensor can hold it."""
    if choice not in _choices:
        _choices.append(choice)
    return _choices.index(choice)


def choice_of(number: int) -> Choice:
    """Look up the choice that has this number."""
    return _choices[number]


def check_name(name: str) -> None:
    """Raise ValueError for a backend that does not exist."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"Unknown backend {name!r}. Expected 'auto' or one of {', '.join(map(repr, BACKENDS))}.")


def check_backend(name: str) -> None:
    """Raise ImportError if the package of a backend that was asked for by name is missing."""
    if name != "auto":
        load(name)


@functools.lru_cache(maxsize=64)
def choose(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, block: int, needs_grad: bool = False
) -> Choice:
    """Return the backend for these calls after a one-off check of its numbers.

    Raises:
        ValueError: if there is no backend of that name.
        ImportError: if the backend's package is missing.
        RuntimeError: if the backend cannot run here, fails the check, or has no backward and one is needed.
        torch.OutOfMemoryError: if the device has too little memory left for the check.
    """
    check_name(name)
    if name != "auto":
        if needs_grad and name not in WITH_BACKWARD:
            raise RuntimeError(
                f"Backend {name!r} has no backward. Choose 'auto' or one of {', '.join(map(repr, WITH_BACKWARD))}, or "
                "run under torch.no_grad()."
            )
        return Choice(name, "asked for", _checked(name, device, dtype, head_dim, block))
    refused = []
    for candidate in AUTO.get(device.type, ("torch",)):
        if needs_grad and candidate not in WITH_BACKWARD:
            refused.append(f"{candidate}: has no backward")
            continue
        try:
            forward = _checked(candidate, device, dtype, head_dim, block)
        except torch.OutOfMemoryError:  # the next time it may work, and a choice is for good
            raise
        except (ImportError, RuntimeError) as error:
            refused.append(f"{candidate}: {error}")
            continue
        reason = f"fastest that works on {device.type} in {dtype} with head_dim {head_dim}"
        reason += f" (refused: {'; '.join(refused)})" if refused else ""
        logger.info("diffusers_draft runs backend %r: %s", candidate, reason)
        return Choice(candidate, reason, forward)
    raise RuntimeError(f"No backend can run on {device} in {dtype} with head_dim {head_dim}: {'; '.join(refused)}")


def load(name: str) -> ModuleType:
    """Import a backend's module.

    Raises:
        ImportError: if its package is missing; the message says how to install it.
    """
    try:
        return importlib.import_module(f".{MODULES.get(name, name)}", __name__)
    except ImportError as error:
        raise ImportError(f"Backend {name!r} needs {PACKAGES.get(name, 'another package')} ({error}).") from error


def refusal(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, block: int) -> str | None:
    """Say why a backend cannot run, or None.

    Raises:
        ImportError: if its package is missing.
    """
    backend = load(name)
    return backend.refusal(device, dtype, head_dim, block) if hasattr(backend, "refusal") else None


def _checked(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, block: int) -> Forward:
    if reason := refusal(name, device, dtype, head_dim, block):
        raise RuntimeError(f"Backend {name!r} {reason}. Choose another backend, or 'auto'.")
    backend: Any = load(name)
    if name != "reference":
        probe.check(name, backend.forward, device, dtype, head_dim, block)
    return backend.forward
