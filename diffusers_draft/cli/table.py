"""`diffusers-draft table`: the numbers of a study, made again from its clips."""

import argparse
from pathlib import Path

from . import CommandError, one_line
from .model_options import check_packages


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds `table` to the command line."""
    parser = subparsers.add_parser(
        "table",
        help="print the table of a finished eval",
        description="Makes the table of a study again from the clips and attention calls in its results.json.",
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="results.json of diffusers-draft eval")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Prints a table for each file.

    Raises:
        CommandError: for a file that cannot be read or is none of eval's, and for a missing package.
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
