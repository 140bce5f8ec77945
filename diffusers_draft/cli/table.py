"""The command `diffusers-draft table`: compute the table of a finished study again from its records."""

import argparse
from pathlib import Path

from . import CommandError, one_line
from .packages import check_packages


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `table` to the command line."""
    parser = subparsers.add_parser(
        "table",
        help="print the table of a finished eval",
        description="Makes the table of a study again from the clips and attention calls in its results.json.",
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="results.json of diffusers-draft eval")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the table of each `results.json`.

    Raises:
        CommandError: for a file that cannot be read or was not written by `eval`, and for a missing package.
    """
    check_packages("eval", "imageio", "imageio_ffmpeg", "torchmetrics", "matplotlib", "tqdm")
    from ..tools.evaluation.results import read_results
    from ..tools.evaluation.table import as_text

    for file in args.files:
        try:
            with one_line(OSError):
                rows = read_results(file)
        except (ValueError, LookupError, TypeError) as error:
            raise CommandError(f"{file} is not a results.json of diffusers-draft eval.") from error
        print(f"{file}\n{as_text(rows)}")
