"""The command `diffusers-draft eval`: measure what sparsity costs in fidelity and saves in time."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from ..attention.draft import SCORES
from ..attention.method import format_tile
from ..attention.select import BUDGETS
from ..config import DraftConfig
from ..schedules import SCHEDULES
from ..tools.bench.measure import environment
from ..tools.generation.loading import device, dtype_of
from . import one_line
from .model_options import CALL, add_model_options, call, check_backend, image, loaded, model
from .option_types import seed, whole
from .outputs import check_output
from .packages import check_packages
from .ranks import check_alone

LISTS = {
    "sparsity": "for example 0.5 0.75 0.9",
    "max-error": "for example 0.03 0.05 0.1, instead of sparsities",
    "schedule": f"{' '.join(SCHEDULES)} (default: {DraftConfig.schedule})",
    "score": f"{' '.join(SCORES)} (default: {DraftConfig.score})",
    "probes": f"for example 0 64 (default: {DraftConfig.probes})",
    "budget": f"{' '.join(BUDGETS)} (default: {DraftConfig.budget})",
    "tile": f"for example 2x8x8 8x16 (default: {format_tile(DraftConfig.tile)})",
    "dense-steps": "for example 0 0.25",
    "dense-timestep": "for example 925 975",
    "dense-layers": "for example none 0 0+1",
    "backend": "for example torch triton",
    "selection": "what chooses the blocks: draft, or a baseline: random, local, oracle",
}
"""Option that takes a list of values -> its help text."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `eval` to the command line."""
    parser = subparsers.add_parser(
        "eval",
        help="compare draft attention with dense attention on many prompts",
        description="Generates every prompt dense and with every setting from the same noise and compares the videos. "
        "A run that was stopped goes on when the same command is given again.",
    )
    add_model_options(parser)
    parser.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE", help="one per line, or a .csv with a column prompt"
    )
    parser.add_argument("--seeds", type=seed, nargs="+", default=[0], help="of the noise (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("eval"), metavar="DIR", help="default: eval")
    settings = parser.add_argument_group(
        "settings", "What is compared with dense attention: every combination of the lists, and each --setting."
    )
    for option, example in LISTS.items():
        settings.add_argument(f"--{option}", nargs="+", metavar="X", help=example)
    settings.add_argument(
        "--setting", action="append", default=[], metavar="KEY=X,...", help="for example sparsity=0.9,budget=row"
    )
    parser.add_argument("--no-videos", dest="videos", action="store_false", help="measure the clips, do not keep them")
    parser.add_argument("--lpips", action="store_true", help="measure LPIPS too")
    parser.add_argument("--vbench", action="store_true", help="score the clips with VBench")
    parser.add_argument(
        "--attention", type=whole(0), nargs="?", const=4, default=0, metavar="PROMPTS",
        help="also measure attention calls, on so many prompts (4 without a number), all at the mean sparsity, "
        "without the schedule",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Check the arguments, run the clips that are missing in the study, and write the results.

    Raises:
        CommandError: for a file that cannot be read, an option that is wrong, a missing package or a full disk.
            Results that were finished before stay.
    """
    check_alone("eval")
    check_packages("eval", "imageio", "imageio_ffmpeg", "transformers", "ftfy", "matplotlib", "torchmetrics", "tqdm")
    from ..tools.evaluation import Store, Study, read_prompts
    from ..tools.evaluation.attention import Samples
    from ..tools.evaluation.metrics import fidelity_metrics
    from ..tools.evaluation.results import NAMES, write_results
    from ..tools.evaluation.store import FOLDERS
    from ..tools.evaluation.table import as_text
    from ..tools.evaluation.vbench import check_installed
    from ..tools.generation.run import call_arguments
    from ..tools.generation.video import check_writable

    with one_line(OSError, ValueError, ImportError):
        if args.vbench:
            check_installed()
            if not args.videos:
                raise ValueError("--vbench scores video files: leave --no-videos out.")
        prompts, settings = read_prompts(args.prompts), _settings(args)
        if args.compile and (args.attention or any(setting.selection != "draft" for setting in settings)):
            raise ValueError("--attention and selections other than draft need a model that is not compiled.")
        for setting in settings:
            check_backend(args, setting.config.method)
            if args.attention and setting.config.max_error is not None:
                raise ValueError("--attention measures calls at a given sparsity: leave it out with max_error.")
        start = image(args)
        store = Store(args.output, _facts(args))
        if args.videos:
            check_writable(args.output / "videos" / "any.mp4", args.fps)
        for name in (*NAMES, *(f"{folder}/any.json" for folder in FOLDERS)):
            check_output(args.output / name)
        metrics = fidelity_metrics(lpips=args.lpips).to(device())

    def inputs(pipe: Any, prompt: str, seed: int) -> dict[str, Any]:
        return call_arguments(pipe, prompt=prompt, seed=seed, image=start, **call(args))

    seeds = list(dict.fromkeys(args.seeds))
    study = Study(store, lambda: loaded(args), inputs, prompts, seeds, settings, metrics, args.videos, args.fps)
    print(f"{len(prompts)} prompts, {len(seeds)} seeds, {len(settings)} settings, results in {args.output}")
    try:
        with one_line(OSError, ValueError, ImportError, RuntimeError):
            study.run()
            if args.attention:
                study.measure_attention(args.attention, Samples())
            title = f"{args.model}, {len(prompts)} prompts"
            rows = write_results(study, device(), title, with_vbench=args.vbench)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"stopped; the same command goes on from what is in {args.output}") from stop
    print(as_text(rows))
    print(f"Wrote {', '.join(NAMES)} in {args.output}.")


def _settings(args: argparse.Namespace) -> list[Any]:
    from ..tools.evaluation import grid, parse_setting
    from ..tools.evaluation.settings import parse_value

    lists = {}
    for key in (option.replace("-", "_") for option in LISTS):
        if texts := getattr(args, key):
            lists[key] = [parse_value(key, text) for text in texts]
    if not lists and not args.setting:
        raise ValueError("There is nothing to compare: give --sparsity 0.5 0.75 0.9, other lists, or --setting.")
    return list(dict.fromkeys((grid(**lists) if lists else []) + [parse_setting(text) for text in args.setting]))


def _facts(args: argparse.Namespace) -> dict[str, Any]:
    chosen = model(args)
    facts = dataclasses.asdict(chosen) | {"dtype": str(dtype_of(chosen)).removeprefix("torch.")}
    facts |= {"image": args.image and str(args.image), "fps": args.fps, "device": environment(device())["device"]}
    return facts | {name: call(args).get(name) for name in CALL.values()}
