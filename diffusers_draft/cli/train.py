"""`diffusers-draft train`: trains the demo's model anew."""

import argparse
from pathlib import Path

from . import CommandError, one_line
from .model_options import check_packages


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds `train` to the command line."""
    parser = subparsers.add_parser(
        "train",
        help="train the demo's small model",
        description="Trains the small Wan pipeline of the demo on videos that are drawn on the way. Give the same "
        "command again to go on with a training that was stopped.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="for checkpoints and the model")
    parser.add_argument("--minutes", type=float, default=22, help="how long, over all times that it goes on")
    parser.add_argument("--seed", type=int, default=0, help="of weights, videos and noise")
    parser.add_argument("--tokens", type=int, default=60_000, help="of a batch of the transformer")
    parser.add_argument("--pixels", type=int, default=3_000_000, help="of a batch of the autoencoder")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Trains and saves the model.

    Raises:
        CommandError: if something cannot be written, or an option is wrong.
    """
    check_packages("train", "matplotlib", "torchmetrics", "transformers", "tqdm", "ftfy")
    if args.minutes <= 0 or args.tokens < 1 or args.pixels < 1:
        raise CommandError("--minutes, --tokens and --pixels must be above 0")
    from ..training.run import Training
    from ..training.run import run as train

    training = Training(minutes=args.minutes, seed=args.seed, tokens=args.tokens, pixels=args.pixels)
    try:
        with one_line(OSError, ValueError):
            args.output.mkdir(parents=True, exist_ok=True)
            model = train(training, args.output)
    except KeyboardInterrupt as stop:
        raise CommandError(f"stopped; the same command goes on from what is in {args.output}") from stop
    print(f"Wrote {model}, to be used as --model of generate and eval.")
