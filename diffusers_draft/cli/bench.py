"""The command `diffusers-draft bench`: time draft attention against dense attention on this machine."""

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..attention import kernels
from ..attention.method import Method, check_grid, format_tile, parse_tile
from ..attention.select import BUDGETS
from ..config import SPARSITY, DraftConfig
from ..tools.bench.attention import Row, run_dense, run_draft, run_paper
from ..tools.bench.measure import environment
from ..tools.bench.pictures import FORMATS, plot, plot_error
from ..tools.bench.reference import Case
from ..tools.bench.rival import run_rival
from ..tools.bench.shapes import SHAPES, Shape, random_inputs, structured_inputs
from ..tools.bench.table import table_lines
from . import CommandError, one_line
from .bench_model import add_model, add_run
from .option_types import DEFAULT, device, seconds, seed, whole
from .outputs import check_output, check_picture, write_output, write_record
from .ranks import check_alone

SIZES = {"heads": (1, 24), "head_dim": (1, 128), "text": (0, 0), "batch": (1, 1)}
"""Of an attention call whose grid is given: the least and the default of each."""


def add_parser(subparsers) -> None:
    """Add `bench` to the command line."""
    bench = subparsers.add_parser("bench", help="measure speed on this machine")
    what = bench.add_subparsers(dest="what", required=True)
    _add_attention(what.add_parser("attention", help="one attention call: dense baselines, backends, stages"))
    add_model(what.add_parser("model", help="one denoising step of a real transformer, dense and sparse"))
    add_run(what.add_parser("run", help="a whole denoising run of a real transformer, dense and sparse"))


def _add_attention(parser: argparse.ArgumentParser) -> None:
    draft = DraftConfig
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--shape", choices=sorted(SHAPES), help="default: cpu-10k on a CPU, hunyuan-768p on a GPU")
    shape.add_argument("--grid", type=int, nargs=3, metavar=("T", "Y", "X"), help="video tokens, instead of --shape")
    for name, (least, value) in SIZES.items():
        parser.add_argument(_option(name), type=whole(least), help=f"beside --grid; default: {value}")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[SPARSITY], help=f"default: {SPARSITY}")
    parser.add_argument(
        "--budget", nargs="+", choices=[*BUDGETS], default=[draft.budget], help=f"default: {draft.budget}"
    )
    parser.add_argument("--tile", default=format_tile(draft.tile), help=f"tokens of a block ({DEFAULT})")
    parser.add_argument("--paper", action="store_true", help="also the paper's settings at each sparsity")
    parser.add_argument("--backend", nargs="+", help="default: every backend but the reference")
    parser.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"], help="default: float32 on a CPU, bfloat16 on a GPU"
    )
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu", help=DEFAULT)
    parser.add_argument("--random", action="store_true", help="Gaussian inputs instead of smooth fields with noise")
    parser.add_argument("--seed", type=seed, default=0, help=DEFAULT)
    parser.add_argument("--seconds", type=seconds, default=1.0, help=f"least time to measure each row ({DEFAULT})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw time against sparsity to this file")
    parser.add_argument("--plot-error", type=Path, metavar="FILE", help="draw error against time to this file")
    parser.set_defaults(run=run_attention)


def run_attention(args: argparse.Namespace) -> None:
    """Time one attention call and print the table.

    Raises:
        CommandError: for an option that is out of range, or a file that cannot be written.
    """
    check_alone("bench attention")
    methods = _methods(args)
    _check_outputs(args)
    on_cpu = args.device.type == "cpu"
    dtype = getattr(torch, args.dtype or ("float32" if on_cpu else "bfloat16"))
    name, shape = _shape(args)
    facts = environment(args.device)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    kind = "random" if args.random else "structured, smooth-valued"
    print(f"{name}: {shape}, {shape.seq_len:,} tokens, {dtype}, {kind} inputs")
    with one_line(RuntimeError):  # too little memory; on a CPU it has no type of its own
        inputs = (random_inputs if args.random else structured_inputs)(shape, args.device, dtype, args.seed)
    case = Case(shape, inputs, args.seconds)
    record: dict[str, Any] = {"environment": facts, "name": name, "shape": vars(shape), "dtype": str(dtype)}
    record |= {"tile": methods[0].tile, "inputs": kind}
    rows: list[Row] = []

    def recorded(new: Iterator[Row]) -> Iterator[Row]:
        for row in new:
            rows.append(row)
            write_record(args.json, record | {"rows": [asdict(row) for row in rows]})
            yield row

    with one_line(torch.OutOfMemoryError), torch.inference_mode():
        dense = list(recorded(run_dense(case)))
        for line in table_lines(dense, recorded(_sparse_rows(args, case, methods)), shape):
            print(line, flush=True)
    title = f"{name}, {facts['device']}, {str(dtype).removeprefix('torch.')}"
    if args.plot:
        write_output(args.plot, lambda path: plot(rows, path, title))
    if args.plot_error:
        write_output(args.plot_error, lambda path: plot_error(rows, path, title))


def _methods(args: argparse.Namespace) -> list[Method]:
    """Check the options of the method; return the library's defaults with each budget that is asked for."""
    with one_line(ValueError):
        for sparsity in args.sparsity:
            DraftConfig(sparsity=sparsity)
        for backend in args.backend or []:
            kernels.check_name(backend)
        if args.grid:
            check_grid(tuple(args.grid), 0)
        return [DraftConfig(budget=budget, tile=parse_tile(args.tile)).method for budget in args.budget]


def _check_outputs(args: argparse.Namespace) -> None:
    if args.json:
        check_output(args.json)
    for picture in filter(None, (args.plot, args.plot_error)):
        check_picture(picture, FORMATS)


def _shape(args: argparse.Namespace) -> tuple[str, Shape]:
    """Return the name and the sizes of the attention call."""
    given = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    if args.grid:
        return "custom", Shape(tuple(args.grid), **{name: value for name, (_, value) in SIZES.items()} | given)
    if given:
        raise CommandError(f"{', '.join(map(_option, given))}: only beside --grid. Every --shape has its own.")
    name = args.shape or ("cpu-10k" if args.device.type == "cpu" else "hunyuan-768p")
    return name, SHAPES[name]


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _sparse_rows(args: argparse.Namespace, case: Case, methods: list[Method]) -> Iterator[Row]:
    """Measure all but dense attention; the rival last, as a kernel that fails can leave the device unusable."""
    backends = args.backend or [backend for backend in kernels.BACKENDS if backend != "reference"]
    for sparsity in args.sparsity:
        for method in methods:
            yield from run_draft(case, sparsity, method, backends)
        if args.paper:
            yield run_paper(case, sparsity)
    if args.device.type == "cuda":
        for sparsity in args.sparsity:
            yield from run_rival(case, sparsity)
