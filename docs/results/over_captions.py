"""What the studies share: their command line, captions, the processes that share the GPUs, and the record."""

import argparse
import json
import multiprocessing
import multiprocessing.pool
import multiprocessing.queues
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO, TypeVar

import torch

from diffusers_draft.tools.bench.measure import environment
from diffusers_draft.tools.demo.model import WEIGHTS

Work = TypeVar("Work")
Record = dict[str, Any]


def study(
    about: str,
    captions: int,
    units: Callable[[list[str], Path], list[Work]],
    run_unit: Callable[[Work], list[Record]],
    packed: Callable[[list[Record]], Record],
) -> Record:
    """Run a study from the command line and write its JSON file.

    What is finished is kept in a file of JSON lines beside it: the environment, then each part of the work with what
    it found. The same command goes on after them where it was cut off, and only puts them together where all is done.

    Args:
        about: the script's docstring.
        captions: how many there are unless asked for.
        units: lists the work for captions and the folder of the JSON file.
        run_unit: does a part of it, in one of several processes.
        packed: puts what was found together, to be written behind the environment and the captions.

    Returns:
        What was written.
    """
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="a JSON file; JSON lines go beside it")
    parser.add_argument("--captions", type=int, default=captions)
    parser.add_argument("--processes", type=int, default=6, help="that share the GPUs")
    args = parser.parse_args()
    chosen = (WEIGHTS / "prompts.txt").read_text().splitlines()[: args.captions]
    todo = units(chosen, args.output.parent)
    path = args.output.with_suffix(".jsonl")
    lines = _whole_lines(path)
    if any(line["unit"] != repr(unit) for line, unit in zip(lines[1:], todo, strict=False)):
        parser.error(f"{path} has other work than was asked for. Remove it, or give another --output.")
    if len(lines) <= len(todo):
        with processes(args.processes) as pool, path.open("a") as file:
            if not lines:
                lines.append(_write(file, environment(torch.device("cuda"))))
            ahead = todo[len(lines) - 1 :]
            for unit, found in zip(ahead, pool.imap(run_unit, ahead), strict=True):
                lines.append(_write(file, {"unit": repr(unit), "found": found}))
                print(f"{len(lines) - 1} of {len(todo)}", flush=True)
    found = [one for line in lines[1 : len(todo) + 1] for one in line["found"]]
    record = {"environment": lines[0], "captions": chosen} | packed(found)
    args.output.write_text(json.dumps(record) + "\n")
    return record


def processes(count: int) -> multiprocessing.pool.Pool:
    """Start so many processes, which take the GPUs in turn."""
    if not torch.cuda.is_available():
        raise SystemExit("A study needs a GPU, and torch sees none.")
    context = multiprocessing.get_context("spawn")
    gpus = context.SimpleQueue()
    for number in range(count):
        gpus.put(number % torch.cuda.device_count())
    return context.Pool(count, _take_gpu, (gpus,))


def _take_gpu(gpus: multiprocessing.queues.SimpleQueue[int]) -> None:
    torch.cuda.set_device(gpus.get())


def _whole_lines(path: Path) -> list[Record]:
    """Read the lines that were written to their end, and cut off one that was not."""
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def _write(file: TextIO, line: Record) -> Record:
    file.write(json.dumps(line) + "\n")
    file.flush()
    return line
