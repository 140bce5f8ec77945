"""One command in several processes, as `torchrun` and `accelerate launch` start them: a rank for each GPU."""

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
"""How long a rank waits for another in one exchange before it gives up. NCCL counts from the call, which comes long
before it is the exchange's turn on the GPU."""
LOADING = datetime.timedelta(hours=2)
"""How long a rank waits until all have loaded the model, which one of them may download."""


def add_ulysses(parser: argparse.ArgumentParser) -> None:
    """Adds `--ulysses`."""
    parser.add_argument(
        "--ulysses",
        type=int,
        default=1,
        metavar="N",
        help="split the video over N GPUs; start with: torchrun --nproc-per-node N -m diffusers_draft ...",
    )


class Ranks:
    """The processes of this command; only one where the video is not split.

    Attributes:
        rank: of this process.
        size: number of processes.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def split(self, pipe: Any) -> None:
        """Splits a pipeline or transformer over the ranks, once all have it.

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


@contextlib.contextmanager
def together(ulysses: int) -> Iterator[Ranks]:
    """Joins the processes of a command; only the first prints what is not an error.

    Args:
        ulysses: how many processes there should be.

    Raises:
        CommandError: if there are others than `--ulysses` says or too few GPUs, or if one of them fails. `torchrun`
            and `accelerate launch` then end the others; without them, each waits as long as `PATIENCE` has it, or
            `LOADING` before all have the model.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
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
    """Takes this rank's GPU, if there are any, and meets the other ranks."""
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
    """What to say of an error that may be another rank's."""
    cause = error.__cause__ or error
    lost = isinstance(cause, dist.DistError) or "gloo" in str(cause).lower()
    line = " ".join(str(error).split())
    return f"Another rank failed or was killed; its own message, if it left one, says why. {line}" if lost else line


@contextlib.contextmanager
def _silenced(silent: bool) -> Iterator[None]:
    """Keeps a rank from printing what the first one prints as well."""
    if not silent:
        yield
        return
    for package in ("diffusers", "transformers"):
        with contextlib.suppress(ImportError):
            importlib.import_module(f"{package}.utils.logging").disable_progress_bar()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
