"""Run one command in several processes, one for each GPU, started by `torchrun` or `accelerate launch`."""

import argparse
import contextlib
import datetime
import importlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from . import CommandError, one_line

PATIENCE = {"gloo": datetime.timedelta(seconds=50), "nccl": datetime.timedelta(minutes=10)}
"""Timeout of one exchange between ranks, by backend. NCCL counts from the call, long before the exchange starts on the
GPU."""
LOADING = datetime.timedelta(hours=2)
"""Timeout for loading the model in all ranks, which may include a download."""


def add_ulysses(parser: argparse.ArgumentParser) -> None:
    """Add the option `--ulysses`."""
    parser.add_argument(
        "--ulysses",
        type=int,
        default=1,
        metavar="N",
        help="split the video over N GPUs; start with: torchrun --nproc-per-node N -m diffusers_draft ...",
    )


class Ranks:
    """The group of processes that runs this command; a single process if the video is not split.

    Attributes:
        rank: rank of this process.
        size: number of processes.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def first(self) -> bool:
        """Whether this process is the one that prints and writes files."""
        return self.rank == 0

    def split(self, pipe: Any) -> None:
        """Split a pipeline or transformer over the ranks, after all of them have loaded it.

        Raises:
            CommandError: if it cannot be split.
        """
        if self.size == 1:
            return
        if not self.first and hasattr(pipe, "set_progress_bar_config"):
            pipe.set_progress_bar_config(disable=True)
        from diffusers import ContextParallelConfig

        from ..patching.parallel import enable_parallelism

        dist.monitored_barrier(dist.new_group(backend="gloo", timeout=LOADING), LOADING)
        with one_line(ValueError, NotImplementedError):
            enable_parallelism(pipe, config=ContextParallelConfig(ulysses_degree=self.size))


def world_size() -> int:
    """Count the processes that `torchrun` or `accelerate launch` started, 1 without them."""
    told = all(name in os.environ for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
    return int(os.environ.get("WORLD_SIZE", 1)) if told else 1


def check_alone(command: str) -> None:
    """Refuse to run a command in several processes, which would write the same files and slow each other down.

    Raises:
        CommandError: if there are several.
    """
    size = world_size()
    if size > 1:
        raise CommandError(f"{command} runs in one process, and was started in {size}. Start it without torchrun.")


@contextlib.contextmanager
def together(ulysses: int) -> Iterator[Ranks]:
    """Join the process group of the command; ranks other than the first print nothing but errors.

    Args:
        ulysses: expected number of processes.

    Raises:
        CommandError: if the number of processes differs from `ulysses`, there are too few GPUs, or a process fails.
            `torchrun` and `accelerate launch` then end the other processes; without them each one waits for
            `PATIENCE`, or for `LOADING` before all have loaded the model.
    """
    size = world_size()
    if ulysses < 1 or size != ulysses:
        raise CommandError(
            f"--ulysses {ulysses} needs as many processes, and this command runs in {size}. Start it with: "
            f"torchrun --nproc-per-node {max(ulysses, size)} -m diffusers_draft ... --ulysses {max(ulysses, size)}"
        )
    if size == 1:
        yield Ranks()
        return
    ranks = Ranks(int(os.environ["RANK"]), size)
    _join()
    with _silenced(not ranks.first):
        try:
            yield ranks
        except (CommandError, RuntimeError, OSError) as error:
            raise CommandError(f"[rank {ranks.rank} of {size}] {_reason(error)}") from error
    dist.destroy_process_group()


def _join() -> None:
    """Select this rank's GPU, if there are any, and initialize the process group."""
    local = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    backend = "gloo"
    if accelerator := torch.accelerator.current_accelerator(check_available=True):
        count = torch.accelerator.device_count()
        if local >= count:
            raise CommandError(f"There are more processes than GPUs on this machine: {count}. Use --ulysses {count}.")
        torch.accelerator.set_device_index(local)
        backend = dist.get_default_backend_for_device(accelerator)
    dist.init_process_group(backend, timeout=PATIENCE.get(backend))


def _reason(error: Exception) -> str:
    """Write the message of an error, and say if another rank is its likely cause."""
    cause = error.__cause__ or error
    lost = isinstance(cause, dist.DistError) or "gloo" in str(cause).lower()
    line = " ".join(str(error).split())
    return f"Another rank failed or was killed; its own message, if it left one, says why. {line}" if lost else line


@contextlib.contextmanager
def _silenced(silent: bool) -> Iterator[None]:
    """Discard standard output and progress bars of the body if `silent`."""
    if not silent:
        yield
        return
    for package in ("diffusers", "transformers"):
        with contextlib.suppress(ImportError):
            importlib.import_module(f"{package}.utils.logging").disable_progress_bar()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
