"""The commands `diffusers-draft bench model` and `bench run`: time a real transformer with random weights."""

import argparse
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..config import SPARSITY, DraftConfig
from ..tools.bench import step as one_step
from ..tools.bench.dense import fastest
from ..tools.bench.measure import environment
from ..tools.bench.models import MODELS
from ..tools.bench.predict import densities_to_measure, predict
from ..tools.bench.run import Bench, Run
from ..tools.bench.shapes import SHAPES
from . import CommandError, one_line
from .backends import check_runs
from .option_types import DEFAULT, seconds, whole
from .outputs import check_output, write_record
from .packages import check_packages
from .ranks import Ranks, add_ulysses, check_alone, together

DEVICE = torch.device("cuda")
SECONDS = 1.0
"""Least time to measure each forward from which `bench run` predicts its runs."""


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the options of `bench model`."""
    _add_options(parser)
    parser.add_argument(
        "--sparsity",
        type=float,
        help=f"mean of the run; default: {SPARSITY}, with --paper the model's in the paper",
    )
    parser.add_argument("--paper", action="store_true", help="the paper's settings instead of the library's")
    parser.add_argument("--steps", type=whole(1), default=50, help=f"steps of the run to predict ({DEFAULT})")
    parser.add_argument("--seconds", type=seconds, default=2.0, help=f"least time to measure each forward ({DEFAULT})")
    add_ulysses(parser)
    parser.set_defaults(run=run_model)


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add the options of `bench run`."""
    _add_options(parser)
    parser.add_argument(
        "--sparsity",
        type=float,
        nargs="+",
        default=[SPARSITY],
        help=f"means of the runs with draft attention; default: {SPARSITY}",
    )
    parser.add_argument("--paper", action="store_true", help="also run with the paper's settings and sparsity")
    parser.add_argument("--steps", type=whole(1), default=10, help=f"denoising steps of a run ({DEFAULT})")
    parser.add_argument(
        "--dense-steps",
        type=whole(1),
        metavar="N",
        help="time only N steps of dense runs, which all cost the same; default: all",
    )
    parser.set_defaults(run=run_runs)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=sorted(MODELS), default="hunyuan-13b-768p", help=DEFAULT)
    parser.add_argument("--backend", default=DraftConfig.backend, help=DEFAULT)
    parser.add_argument("--compile", action="store_true", help="compile the repeated blocks")
    parser.add_argument("--default", action="store_true", help="also time the attention that diffusers chooses")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")


def run_model(args: argparse.Namespace) -> None:
    """Time one denoising step of a transformer and predict the time of a whole run.

    Raises:
        CommandError: if there is no CUDA GPU, an option is out of range, or the backend cannot run here.
    """
    _check(args, "model")
    if args.paper:
        config = _paper(args, MODELS[args.model].sparsity if args.sparsity is None else args.sparsity)
    else:
        config = _config(args, SPARSITY if args.sparsity is None else args.sparsity)
    _check_backend(args, config)
    with one_line(torch.OutOfMemoryError), together(args.ulysses) as ranks:
        _run_model(args, config, ranks)


def run_runs(args: argparse.Namespace) -> None:
    """Time whole runs, dense and with draft attention, and show how good their prediction was.

    Raises:
        CommandError: if a package or a CUDA GPU is missing, an option is out of range, or the backend cannot run here.
    """
    check_alone("bench run")
    check_packages("generate", "transformers")
    timed = args.steps if args.dense_steps is None else args.dense_steps
    _check(args, "run")
    if timed > args.steps:
        raise CommandError(f"--dense-steps must be at most --steps {args.steps}, got {timed}.")
    configs = {f"draft {sparsity:g}": _config(args, sparsity) for sparsity in args.sparsity}
    if args.paper:
        configs["paper"] = _paper(args, MODELS[args.model].sparsity)
    for config in configs.values():
        _check_backend(args, config)
    facts = environment(DEVICE)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    options = {"compiled": args.compile, "backend": args.backend, "steps": args.steps, "dense_steps": timed}
    record: dict[str, Any] = {"environment": facts, "model": args.model, "options": options}
    runs = []
    with one_line(torch.OutOfMemoryError):
        for run in _runs(args, configs, timed):
            runs.append(run)
            print(_line(run, runs[0]))
            write_record(args.json, record | {"runs": [asdict(run) for run in runs]})


def _check(args: argparse.Namespace, what: str) -> None:
    """Refuse what cannot work before the work begins."""
    if args.json:
        check_output(args.json)
    if not torch.cuda.is_available():
        raise CommandError(f"bench {what} needs a CUDA GPU: a real transformer's step takes minutes on a CPU.")


def _check_backend(args: argparse.Namespace, config: DraftConfig) -> None:
    check_runs(config.method, DEVICE, torch.bfloat16, SHAPES[MODELS[args.model].shape].head_dim)


def _config(args: argparse.Namespace, sparsity: float) -> DraftConfig:
    with one_line(ValueError):
        return DraftConfig(sparsity=sparsity, backend=args.backend)


def _paper(args: argparse.Namespace, sparsity: float) -> DraftConfig:
    with one_line(ValueError):
        return replace(DraftConfig.paper(sparsity), backend=args.backend)


def _runs(args: argparse.Namespace, configs: dict[str, DraftConfig], timed: int) -> Iterator[Run]:
    """Run dense, the fastest kernel first, and then with draft attention."""
    kernel = fastest(SHAPES[MODELS[args.model].shape], DEVICE, torch.bfloat16)
    bench = Bench(args.model, compiled=args.compile, device=DEVICE)
    predictions = list(bench.predictions(kernel, list(configs.values()), args.steps, SECONDS))
    yield replace(bench.dense(kernel, args.steps, timed), predicted_s=predictions[0]["dense_s"])
    if args.default:
        yield bench.dense(None, args.steps, timed)
    for (name, config), prediction in zip(configs.items(), predictions, strict=True):
        yield replace(bench.draft(name, config, args.steps), predicted_s=prediction["draft_s"])


def _line(run: Run, dense: Run) -> str:
    line = (
        f"{run.name:20s} {run.seconds:8.1f} s, {dense.seconds / run.seconds:5.2f}x   memory {run.memory_gib:.2f} GiB"
    )
    return line if run.predicted_s is None else f"{line}   predicted {run.predicted_s:.1f} s"


def _run_model(args: argparse.Namespace, config: DraftConfig, ranks: Ranks) -> None:
    facts = environment(DEVICE)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    densities = densities_to_measure(args.model, config, args.steps)
    how: dict[str, Any] = dict(compiled=args.compile, default=args.default, device=DEVICE, seconds=args.seconds)
    options = {"config": asdict(config), "compiled": args.compile}
    options |= {"ulysses": args.ulysses} if args.ulysses > 1 else {}
    record: dict[str, Any] = {"environment": facts, "model": args.model, "options": options}
    file = args.json if ranks.first else None
    steps = []
    for step in one_step.run(args.model, config, densities, **how, split=ranks.split if ranks.size > 1 else None):
        steps.append(step)
        blocks = ", ".join(f"{path} {cost:.2f}" for path, cost in step.block_ms.items())
        print(f"{step.name:20s} step {step.step_ms:9.1f} ms   blocks: {blocks} ms   memory {step.memory_gib:.2f} GiB")
        write_record(file, record | {"steps": [asdict(step) for step in steps]})
    prediction = predict(args.model, config, steps, args.steps)
    print(
        f"a sparse step is {prediction['step_speedup']:.2f}x the best dense one; {args.steps} steps, "
        f"{prediction['dense_steps']} of them dense: {prediction['draft_s']:.0f} s instead of "
        f"{prediction['dense_s']:.0f} s ({prediction['run_speedup']:.2f}x)"
    )
    if ranks.size > 1:
        print(
            f"with all layers sparse, {ranks.size} GPUs are {prediction['gpu_speedup']:.2f}x as fast as one; "
            f"exchanges alone would take {prediction['exchange_share']:.0%} of that time"
        )
    write_record(file, record | {"prediction": prediction, "steps": [asdict(step) for step in steps]})
