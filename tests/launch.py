"""A few processes side by side, each a rank of a gloo group, that run functions of `ranks.py`."""

import multiprocessing
import tempfile
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest

WORLD = 8
STARTUP, SECONDS = 400, 400
"""The longest that imports and then any function may take, on a machine that is busy."""


class Pool:
    """Processes that wait for work; groups are made anew for each piece of it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.folder = tempfile.TemporaryDirectory()
        self.count = 0
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["ranks"])
        self.pipes: list[Connection] = []
        self.processes = []
        for _ in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)
        for pipe in self.pipes:
            assert pipe.poll(STARTUP), "a process has not started"
            pipe.recv()

    def run(self, size: int, function: str, *args: Any, **options: Any) -> list[Any]:
        """Runs `ranks.function(*args, **options)` in a group of so many ranks.

        Returns:
            What each rank returned, or the exception that it raised.
        """
        self.count += 1
        store = Path(self.folder.name) / str(self.count)
        pipes = self.pipes[:size]
        for rank, pipe in enumerate(pipes):
            pipe.send((rank, size, store, function, args, options))
        results: dict[Connection, Any] = {}
        while len(results) < size:
            ready = wait([pipe for pipe in pipes if pipe not in results], SECONDS)
            if not ready:
                self.stop()  # or a later answer would be taken for that to other work
                self.start()
                raise AssertionError(f"{function}{args}: a rank is stuck")
            results |= {pipe: pipe.recv() for pipe in ready if isinstance(pipe, Connection)}
        return [results[pipe] for pipe in pipes]

    def stop(self) -> None:
        for process in self.processes:
            process.terminate()

    def close(self) -> None:
        self.stop()
        self.folder.cleanup()


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(WORLD)
    yield pool
    pool.close()


def _serve(pipe: Connection) -> None:
    import ranks

    pipe.send("ready")
    while True:
        rank, size, store, function, args, options = pipe.recv()
        try:
            pipe.send(ranks.in_group(rank, size, store, function, *args, **options))
        except Exception as error:
            traceback.print_exc()
            pipe.send(error)
