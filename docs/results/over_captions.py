"""What the studies share: their command line, captions, the processes that share the GPUs, and the record."""

import argparse
import hashlib
import json
import multiprocessing
import multiprocessing.queues
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, TypeVar

import torch

from diffusers_draft.tools.bench.measure import environment
from diffusers_draft.tools.demo.model import WEIGHTS
from diffusers_draft.tools.generation.files import replacing

Work = TypeVar("Work")
Record = dict[str, Any]
_texts = (path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
SCRIPTS = hashlib.sha256(b"".join(_texts)).hexdigest()
"""Tells whether a study was changed since it was begun."""


def study(
    about: str,
    captions: int,
    units: Callable[[list[str], Path], list[Work]],
    run_unit: Callable[[Work], list[Record]],
    packed: Callable[[list[Record]], Record],
) -> Record:
    """Run a study from the command line and write its JSON file.

    What is finished is kept in a file of JSON lines beside it: the scripts' hash and the environment, then each part
    of the work with what it found. The same command goes on after them where it was cut off, on the same kind of
    machine, and only puts them together where all is done.

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
    parser.add_argument("--output", type=Path, required=True, help="a JSON file; FILE.lines goes beside it")
    parser.add_argument("--captions", type=int, default=captions)
    parser.add_argument("--processes", type=int, default=6, help="that share the GPUs")
    args = parser.parse_args()
    chosen = (WEIGHTS / "prompts.txt").read_text().splitlines()[: args.captions]
    todo = units(chosen, args.output.parent)
    path = Path(f"{args.output}.lines")
    lines = _whole_lines(path)
    expected = [SCRIPTS, *map(repr, todo)]
    if any(line.get("of") != one for line, one in zip(lines, expected, strict=False)):
        parser.error(f"{path} has other work than was asked for. Remove it, or give another --output.")
    if len(lines) <= len(todo):
        machine = this_machine()
        if lines and not _alike(machine, lines[0]["found"]):
            parser.error(f"{path} was begun on another machine: {lines[0]['found']}. This is {machine}.")
        with path.open("a") as file, processes(args.processes) as pool:
            if not lines:
                lines.append(_write(file, {"of": SCRIPTS, "found": machine}))
            ahead = todo[len(lines) - 1 :]
            for unit, found in zip(ahead, pool.map(run_unit, ahead), strict=True):
                lines.append(_write(file, {"of": repr(unit), "found": found}))
                print(f"{len(lines) - 1} of {len(todo)}", flush=True)
    found = [one for line in lines[1 : len(todo) + 1] for one in line["found"]]
    record = {"environment": lines[0]["found"], "captions": chosen} | packed(found)
    with replacing(args.output) as part:
        part.write_text(json.dumps(record) + "\n")
    return record


def this_machine() -> Record:
    """Describe the machine, which must have a GPU."""
    if not torch.cuda.is_available():
        raise SystemExit("A study needs a GPU, and torch sees none.")
    return environment(torch.device("cuda"))


@contextmanager
def processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """Start so many processes, which take the GPUs in turn. One that is killed ends the work with an error."""
    context = multiprocessing.get_context("spawn")
    gpus = context.SimpleQueue()
    for number in range(count):
        gpus.put(number % torch.cuda.device_count())
    pool = ProcessPoolExecutor(count, context, _take_gpu, (gpus,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _take_gpu(gpus: multiprocessing.queues.SimpleQueue[int]) -> None:
    torch.cuda.set_device(gpus.get())


def _whole_lines(path: Path) -> list[Record]:
    """Read the lines that were written to their end, and cut off one that was not."""
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        os.truncate(path, len(whole.encode()))
    return [json.loads(line) for line in whole.splitlines()]


def _alike(one: Record, other: Record) -> bool:
    """Compare two environments but for the day and the command."""
    return all(one[key] == other.get(key) for key in one if key not in ("date", "command"))


def _write(file: TextIO, line: Record) -> Record:
    file.write(json.dumps(line) + "\n")
    file.flush()
    return line
