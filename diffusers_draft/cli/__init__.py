"""The `diffusers-draft` command: one module of this package for each subcommand.

A subcommand module has `add_parser(subparsers)`, which adds its parser and sets its function by
`parser.set_defaults(run=run)`. `run` takes the parsed arguments and raises `CommandError` for errors that the user can
fix.
"""

import argparse
import contextlib
import importlib
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

from .. import __version__

SUBCOMMANDS = {
    "demo": "demo",
    "generate": "generate",
    "eval": "evaluate",
    "table": "table",
    "bench": "bench",
    "models": "models",
    "doctor": "doctor",
}
"""Name of each subcommand -> its module in this package."""


class CommandError(Exception):
    """An error that the user can fix. Its message is one line that says what is wrong and what to do."""


@contextlib.contextmanager
def one_line(*errors: type[Exception]) -> Iterator[None]:
    """Raise `CommandError` with a one-line message instead of the given errors."""
    try:
        yield
    except errors as error:
        raise CommandError(" ".join(str(error).split())) from error


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run one subcommand.

    Args:
        argv: the arguments without the program's name; by default those of the process.

    Returns:
        The exit code 0. Errors that the user can fix end the process with code 2 and one line on stderr, Ctrl-C with
        code 130 and one line.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _Parser(prog="diffusers-draft", description="Block-sparse attention for diffusers video transformers.")
    parser.add_argument("--version", action="version", version=__version__)
    try:
        _run(parser, argv)
    except CommandError as error:
        parser.error(str(error))
    except KeyboardInterrupt as stop:
        parser.exit(130, f"{parser.prog}: {str(stop) or 'stopped'}\n")
    return 0


def _run(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    """Import the subcommand, which takes a while, parse its arguments and run it."""
    subparsers = parser.add_subparsers(required=True, metavar="command")
    # Import only the subcommand that was asked for; import all of them for --help and for a wrong name.
    for name in argv[:1] if argv[:1] and argv[0] in SUBCOMMANDS else SUBCOMMANDS:
        importlib.import_module(f".{SUBCOMMANDS[name]}", __name__).add_parser(subparsers)
    args = parser.parse_args(argv)
    args.run(args)
