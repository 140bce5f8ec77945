"""The command `diffusers-draft models`: print the table of supported models."""

import argparse

from ..tools.catalogue import models_table


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `models` to the command line."""
    parser = subparsers.add_parser(
        "models",
        help="list the supported models",
        description="Prints the models that draft attention knows and what the paper keeps dense, as Markdown.",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the table of supported models as Markdown."""
    print(models_table())
