"""What each backend takes on this machine, found by running its own check."""

from dataclasses import dataclass

import torch

from ..attention import kernels
from ..attention.kernels import probe
from .bench.measure import environment

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 96, 128)
BLOCKS = (64, 128)
HEAD_DIM, BLOCK = 128, 128
"""What the others are varied from, one at a time: compiling every combination would take minutes."""


@dataclass(frozen=True)
class Finding:
    """What a backend computes rightly on a device.

    Attributes:
        name: of the backend.
        dtypes: at `HEAD_DIM` and `BLOCK`; none if the backend does not work.
        head_dims: in the first dtype that works.
        blocks: in the first dtype that works.
        refused: "bfloat16", "head_dim 96" or "blocks of 64" -> why not. That of the usual dtype comes first.
    """

    name: str
    dtypes: list[str]
    head_dims: list[int]
    blocks: list[int]
    refused: dict[str, str]

    @property
    def works(self) -> bool:
        return bool(self.dtypes)


def usual_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype that models have on a device."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def facts(device: torch.device) -> dict[str, str]:
    """Collect the device, the versions of packages, and what torch was built for."""
    built = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    found = environment(device)
    found["build of torch"] = next((f"{name} {version}" for name, version in built.items() if version), "CPU")
    if device.type == "cuda":
        found["compute capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return found


def examine(name: str, device: torch.device) -> Finding:
    """Run a backend's check in every dtype and, in the first that works, for every head size and block."""
    refused: dict[str, str] = {}

    def takes(what: str, dtype: torch.dtype, head_dim: int = HEAD_DIM, block: int = BLOCK) -> bool:
        if reason := failure(name, device, dtype, head_dim, block):
            refused[what] = reason
        return not reason

    usual_first = DTYPES if usual_dtype(device) == DTYPES[0] else DTYPES[::-1]
    dtypes = [dtype for dtype in usual_first if takes(_word(dtype), dtype)]
    if not dtypes:
        return Finding(name, [], [], [], refused)
    first = dtypes[0]
    head_dims = [size for size in HEAD_DIMS if size == HEAD_DIM or takes(f"head_dim {size}", first, head_dim=size)]
    blocks = [size for size in BLOCKS if size == BLOCK or takes(f"blocks of {size}", first, block=size)]
    return Finding(name, [_word(dtype) for dtype in dtypes], head_dims, blocks, refused)


def failure(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, block: int) -> str | None:
    """Say why a backend cannot run, or return None if it ran and its numbers were right."""
    torch.compiler.reset()  # else torch stops compiling after eight variants
    try:
        if reason := kernels.refusal(name, device, dtype, head_dim, block):
            return reason
        probe.check(name, kernels.load(name).forward, device, dtype, head_dim, block)
    except Exception as error:  # whatever a foreign kernel or compiler raises is a finding
        return str(error).removeprefix(f"Backend {name!r} ") or type(error).__name__
    return None


def choice(device: torch.device) -> dict[str, str | None]:
    """Return the backend that "auto" takes for the usual call on a device, or None, and the reason."""
    dtype = usual_dtype(device)
    try:
        chosen = kernels.choose("auto", device, dtype, HEAD_DIM, BLOCK)
    except Exception as error:
        return {"backend": None, "dtype": _word(dtype), "reason": str(error) or type(error).__name__}
    return {"backend": chosen.name, "dtype": _word(dtype), "reason": chosen.reason}


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
