"""What the studies share: the processes that share the GPUs, and a command line, captions and the record."""

import argparse
import json
import multiprocessing
import multiprocessing.pool
import multiprocessing.queues
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from diffusers_draft.tools.bench.measure import environment
from diffusers_draft.tools.demo.model import WEIGHTS

Work = TypeVar("Work")
Result = TypeVar("Result")


def processes(count: int) -> multiprocessing.pool.Pool:
    """Start so many processes, which take the GPUs in turn."""
    context = multiprocessing.get_context("spawn")
    gpus = context.SimpleQueue()
    for number in range(count):
        gpus.put(number % torch.cuda.device_count())
    return context.Pool(count, _take_gpu, (gpus,))


def _take_gpu(gpus: multiprocessing.queues.SimpleQueue[int]) -> None:
    torch.cuda.set_device(gpus.get())


def study(
    about: str,
    captions: int,
    units: Callable[[list[str]], list[Work]],
    run_unit: Callable[[Work], Result],
    record: Callable[[list[Work], list[Result]], dict[str, Any]],
) -> None:
    """Run a study from the command line and write its JSON file.

    Args:
        about: the script's docstring.
        captions: how many there are unless asked for.
        units: lists the work.
        run_unit: does a part of it, in one of several processes.
        record: puts the results together, to be written behind the environment and the captions.
    """
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="a JSON file")
    parser.add_argument("--captions", type=int, default=captions)
    parser.add_argument("--processes", type=int, default=6, help="that share the GPUs")
    args = parser.parse_args()
    chosen = (WEIGHTS / "prompts.txt").read_text().splitlines()[: args.captions]
    todo = units(chosen)
    with processes(args.processes) as pool:
        results = pool.map(run_unit, todo, chunksize=1)
    facts = {"environment": environment(torch.device("cuda")), "captions": chosen}
    args.output.write_text(json.dumps(facts | record(todo, results)) + "\n")
