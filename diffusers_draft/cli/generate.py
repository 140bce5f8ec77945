"""The command `diffusers-draft generate`: generate a video with any supported diffusers pipeline."""

import argparse
from pathlib import Path
from typing import Any

from .. import DraftConfig, enable_draft_attention
from ..attention.draft import SCORES
from ..attention.method import format_tile, parse_tile
from ..attention.select import BUDGETS
from ..config import SPARSITY
from ..schedules import SCHEDULES
from . import CommandError, one_line
from .model_options import add_model_options, call, check_backend, image, loaded
from .option_types import DEFAULT, finite, layers, seed, share
from .packages import check_packages
from .ranks import Ranks, add_ulysses, together


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `generate` to the command line."""
    parser = subparsers.add_parser(
        "generate",
        help="generate a video with any supported diffusers model",
        description="Generates a video with draft attention and prints what draft attention did.",
    )
    add_model_options(parser)
    add_ulysses(parser)
    parser.add_argument("--prompt", required=True, help="what the video shall show")
    parser.add_argument("--seed", type=seed, default=0, help="of the noise (default: 0)")
    draft = DraftConfig
    parser.add_argument(
        "--sparsity", type=float, help=f"mean share of the block pairs to skip (default: {SPARSITY:g})"
    )
    parser.add_argument("--max-error", type=float, metavar="X", help="the error to arrive at, instead of --sparsity")
    parser.add_argument("--schedule", choices=[*SCHEDULES], default=draft.schedule, help=f"of the density ({DEFAULT})")
    parser.add_argument("--score", choices=[*SCORES], default=draft.score, help=f"{DEFAULT}; the paper: mass")
    parser.add_argument(
        "--probes",
        type=int,
        default=draft.probes,
        help=f"exact rows for the correction ({DEFAULT}; the paper: 0)",
    )
    parser.add_argument("--budget", choices=[*BUDGETS], default=draft.budget, help=f"{DEFAULT}; the paper: head")
    parser.add_argument(
        "--tile", default=format_tile(draft.tile), help=f"tokens of a block ({DEFAULT}; the paper: 8x16)"
    )
    parser.add_argument(
        "--dense-steps",
        type=share,
        metavar="SHARE",
        help="of the run that stays dense (default: by the schedule)",
    )
    parser.add_argument("--dense-timestep", type=finite, metavar="X", help="steps above it stay dense")
    parser.add_argument("--dense-layers", type=layers, metavar="N+N", help="that stay dense, for example 0+1, or none")
    parser.add_argument("--backend", default=draft.backend, help=f"what computes the sparse attention ({DEFAULT})")
    parser.add_argument("--dense", action="store_true", help="leave draft attention out, to compare with")
    parser.add_argument("--output", type=Path, default=Path("out.mp4"), metavar="FILE", help="default: out.mp4")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Check the options, load the pipeline, generate the video and write it.

    Raises:
        CommandError: if the model, the image or an option is wrong, or the video cannot be written. In the last case
            its frames are kept, and the message says where.
    """
    check_packages("generate", "imageio", "imageio_ffmpeg", "transformers", "ftfy")
    with together(args.ulysses) as ranks:
        _run(args, ranks)


def _run(args: argparse.Namespace, ranks: Ranks) -> None:
    from ..tools.generation.run import call_arguments
    from ..tools.generation.run import run as run_pipeline
    from ..tools.generation.video import check_writable

    with one_line(ValueError, OSError):
        config = DraftConfig(
            sparsity=args.sparsity,
            max_error=args.max_error,
            schedule=args.schedule,
            score=args.score,
            probes=args.probes,
            budget=args.budget,
            tile=parse_tile(args.tile),
            dense_steps=args.dense_steps,
            dense_timestep=args.dense_timestep,
            dense_layers=args.dense_layers,
            backend=args.backend,
        )
        if ranks.first:
            check_writable(args.output, args.fps)
    if not args.dense:
        check_backend(args, config.method)
    start = image(args)
    pipe = loaded(args, ranks.split)
    with one_line(ValueError, ImportError, RuntimeError):
        arguments = call_arguments(pipe, prompt=args.prompt, seed=args.seed, image=start, **call(args))
        handle = None if args.dense else enable_draft_attention(pipe, config=config)
        clip = run_pipeline(pipe, arguments)
    try:
        if ranks.first:
            _write(clip.frames, args.output, args.fps)
    finally:
        print(handle.report() if handle else "dense: draft attention was left out")
        print(f"Denoising took {clip.denoising_seconds:.1f} s, the whole call {clip.seconds:.1f} s.")
    print(f"Wrote {args.output}.")


def _write(frames: Any, path: Path, fps: float) -> None:
    from ..tools.generation.video import keep_frames, write_video

    try:
        write_video(frames, path, fps)
    except OSError as error:
        with one_line(OSError):
            kept = keep_frames(frames, path)
        raise CommandError(f"{error} The frames are kept in {kept} (numpy.load(...)['frames']).") from error
