"""The command `diffusers-draft bench`: time draft attention against dense attention on this machine."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

from ..attention import kernels
from ..attention.method import check_grid
from ..config import DraftConfig
from ..tools.bench.attention import Case, run_dense, run_draft
from ..tools.bench.measure import environment
from ..tools.bench.shapes import SHAPES, Shape, random_inputs, structured_inputs
from ..tools.bench.table import format_table, plot
from . import CommandError
from .bench_model import add_model, add_run


def add_parser(subparsers) -> None:
    """Add `bench` to the command line."""
    bench = subparsers.add_parser("bench", help="measure speed on this machine")
    what = bench.add_subparsers(dest="what", required=True)
    _add_attention(what.add_parser("attention", help="one attention call: dense baselines, backends, stages"))
    add_model(what.add_parser("model", help="one denoising step of a real transformer, dense and sparse"))
    add_run(what.add_parser("run", help="a whole denoising run of a real transformer, dense and sparse"))


def _add_attention(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=sorted(SHAPES), help="default: cpu-10k on a CPU, hunyuan-768p on a GPU")
    parser.add_argument("--grid", type=int, nargs=3, metavar=("T", "Y", "X"), help="video tokens, instead of --shape")
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--text", type=int, default=0, help="text tokens behind the video")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9])
    parser.add_argument("--budget", nargs="+", choices=["head", "row"], default=["head", "row"])
    parser.add_argument("--tile", type=int, nargs="+", default=[8, 16], help="default: the paper's 8 16")
    parser.add_argument("--backend", nargs="+", help="default: every backend but the reference")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="default: float32 on CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--random", action="store_true", help="Gaussian inputs instead of smooth fields with noise")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1.0, help="least time to measure each row")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--plot", type=Path, help="draw time against sparsity to this file")
    parser.set_defaults(run=run_attention)


def run_attention(args: argparse.Namespace) -> None:
    """Time one attention call and print the table.

    Raises:
        CommandError: for an option that is out of range.
    """
    try:
        for sparsity in args.sparsity:
            DraftConfig(sparsity=sparsity, tile=args.tile)
        for backend in args.backend or []:
            kernels.check_name(backend)
        if args.grid:
            check_grid(tuple(args.grid), 0)
    except ValueError as error:
        raise CommandError(str(error)) from error
    device = torch.device(args.device)
    on_cpu = device.type == "cpu"
    dtype = getattr(torch, args.dtype or ("float32" if on_cpu else "bfloat16"))
    name = args.shape or ("cpu-10k" if on_cpu else "hunyuan-768p")
    shape = SHAPES[name]
    if args.grid:
        name, shape = "custom", Shape(tuple(args.grid), args.heads, args.head_dim, args.text, args.batch)
    facts = environment(device)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    kind = "random" if args.random else "structured"
    print(f"{name}: {shape}, {shape.seq_len:,} tokens, {dtype}, {kind} inputs")
    inputs = (random_inputs if args.random else structured_inputs)(shape, device, dtype, args.seed)
    case = Case(shape, inputs, args.seconds)
    backends = args.backend or [backend for backend in kernels.BACKENDS if backend != "reference"]
    with torch.inference_mode():
        rows = list(run_dense(case))
        for sparsity in args.sparsity:
            for budget in args.budget:
                rows += run_draft(case, sparsity, budget, tuple(args.tile), backends)
    print(format_table(rows, shape))
    if args.json:
        record = {"environment": facts, "name": name, "shape": vars(shape), "dtype": str(dtype), "tile": args.tile}
        record |= {"inputs": kind, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    if args.plot:
        plot(rows, args.plot, f"{name}, {facts['device']}, {str(dtype).removeprefix('torch.')}")
