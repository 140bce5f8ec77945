"""Timing, and a description of the machine for the record."""

import datetime
import importlib.metadata
import math
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.benchmark import Timer, timer

PACKAGES = (
    "diffusers-draft",
    "accelerate",
    "diffusers",
    "torch",
    "triton",
    "flash-attn-4",
    "block-sparse-attn",
    "comfy-kitchen",
)
"""Whose versions a record has, where they are installed."""


@dataclass(frozen=True)
class Time:
    """Median and quartiles, in milliseconds, of `runs` runs."""

    median: float
    low: float
    high: float
    runs: int


def measure(call: Callable[[], object], seconds: float = 1.0) -> Time:
    """Time a call after warming up, waiting for the device around every block of runs.

    In a process group every process makes the same number of calls, so that their exchanges match, and the result is
    the mean over processes, because GPUs differ in speed.
    """
    for _ in range(2):
        call()
    if dist.is_initialized():
        first = torch.tensor(_once(call), device=torch.accelerator.current_accelerator(check_available=True))
        dist.broadcast(first, 0)
        enough = math.ceil(seconds / first.item())
        runs = max(3, enough)
        for _ in range(enough):  # until the clocks of the GPUs are steady
            call()
        times = torch.tensor([_once(call) for _ in range(runs)]) * 1e3
        quartiles = times.quantile(torch.tensor([0.25, 0.5, 0.75])).to(first)
        dist.all_reduce(quartiles)
        low, median, high = (quartiles / dist.get_world_size()).tolist()
        return Time(median, low, high, runs)
    many = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    result = many.blocked_autorange(min_run_time=seconds)
    low, high = (float(torch.tensor(result.times).quantile(q)) * 1e3 for q in (0.25, 0.75))
    return Time(result.median * 1e3, low, high, len(result.times) * result.number_per_run)


def _once(call: Callable[[], object]) -> float:
    """Time one call in seconds; `Timer.timeit` would make two more."""
    begin = timer()
    call()
    return timer() - begin


def environment(device: torch.device) -> dict[str, str]:
    """Collect device, versions, date and command for the record of a measurement."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        **versions,
        "date": datetime.date.today().isoformat(),
        "command": " ".join([_program(Path(sys.argv[0])), *sys.argv[1:]]),
    }


def _program(path: Path) -> str:
    """Name a script of a study by its path, and the package by its command, however it was started."""
    if path.suffix == ".py" and path.name != "__main__.py":
        return f"python {path}"
    if dist.is_initialized():
        return f"torchrun --nproc-per-node {dist.get_world_size()} -m diffusers_draft"
    return "diffusers-draft"
