"""The command `diffusers-draft doctor`: say which backends work on this machine, and why the others do not."""

import argparse
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from ..attention import kernels
from ..tools.doctor import Finding, choice, examine, facts
from . import CommandError
from .option_types import device
from .outputs import check_output, write_record

COLUMNS = "{:18s} {:6s} {:28s} {:13s} {}"
REASON = 200
"""Most characters of a reason in the table. The record has all of it."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `doctor` to the command line."""
    parser = subparsers.add_parser(
        "doctor",
        help="say which backends work on this machine, and why the others do not",
        description="Runs each backend's own check. Takes a minute or more, as flex is compiled for each variant.",
    )
    names = kernels.BACKENDS
    parser.add_argument("--backend", nargs="+", choices=names, default=names, help="default: all of them")
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same to this file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print versions, a row for each backend as soon as it is known, and what "auto" takes.

    Raises:
        CommandError: if no backend works, or the file cannot be written.
    """
    if args.json:
        check_output(args.json)
    found = facts(args.device)
    for name, value in found.items():
        print(f"{name:18s} {value}")
    print(f"\n{COLUMNS.format('backend', 'works', 'dtypes', 'head sizes', 'blocks')}", flush=True)
    findings = []
    for name in args.backend:
        findings.append(examine(name, args.device))
        print(*_rows(findings[-1]), sep="\n", flush=True)
    auto = choice(args.device)
    print(f"\nauto takes {auto['backend'] or 'none'} in {auto['dtype']}: {_short(str(auto['reason']))}")
    backends = [{"works": finding.works, **asdict(finding)} for finding in findings]
    write_record(args.json, {"environment": found, "auto": auto, "backends": backends})
    if not any(finding.works for finding in findings):
        raise CommandError(f"No backend works on {args.device}: the table says why.")


def _rows(finding: Finding) -> Iterator[str]:
    """Write a backend's row and, below it, what a backend that works does not take."""
    if not finding.works:
        yield f"{finding.name:18s} {'no':6s} {_short(next(iter(finding.refused.values())))}"
        return
    lists = [", ".join(map(str, values)) for values in (finding.dtypes, finding.head_dims, finding.blocks)]
    yield COLUMNS.format(finding.name, "yes", *lists)
    for what, reason in finding.refused.items():
        yield f"{'':25s} not {what}: {_short(reason)}"


def _short(reason: str) -> str:
    return textwrap.shorten(reason, REASON, placeholder=" ...")
