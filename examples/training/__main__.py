"""Train the demo's model anew: `python -m examples.training --output DIR` in a checkout."""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import torch

PACKAGES = ("ftfy", "matplotlib", "torchmetrics", "tqdm", "transformers")
"""Packages that a training imports, some of them only at its end; the extra `train` installs them."""


def main(argv: Sequence[str] | None = None) -> None:
    """Train and save the model; errors that the user can fix end the process with code 2 and one line on stderr.

    Args:
        argv: the arguments without the program's name; by default those of the process.
    """
    options = _parser().parse_args(argv)
    if options.minutes <= 0 or options.tokens < 1 or options.pixels < 1:
        _stop("--minutes, --tokens and --pixels must be above 0")
    if not hasattr(torch.optim, "Muon"):
        _stop(f"the training needs torch 2.9 or newer, for torch.optim.Muon; this is torch {torch.__version__}")
    if missing := [package for package in PACKAGES if find_spec(package) is None]:
        _stop(f"{', '.join(missing)} is not installed: pip install '.[train]'")
    from .run import Training, run  # imported late, so that a wrong option or a missing package is reported at once

    training = Training(minutes=options.minutes, seed=options.seed, tokens=options.tokens, pixels=options.pixels)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        model = run(training, options.output)
    except (OSError, ValueError) as error:
        _stop(" ".join(str(error).split()))
    except KeyboardInterrupt:
        _stop(f"stopped; the same command goes on from what is in {options.output}")
    print(f"Wrote {model}, to be used as --model of diffusers-draft generate and eval.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.training",
        description="Trains the small Wan pipeline of the demo on videos that are drawn on the way. Give the same "
        "command again to go on with a training that was stopped.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="for checkpoints and the model")
    parser.add_argument("--minutes", type=float, default=22, help="how long, over all times that it goes on")
    parser.add_argument("--seed", type=int, default=0, help="of weights, videos and noise")
    parser.add_argument("--tokens", type=int, default=60_000, help="of a batch of the transformer")
    parser.add_argument("--pixels", type=int, default=3_000_000, help="of a batch of the autoencoder")
    return parser


def _stop(message: str) -> NoReturn:
    """End the process with code 2 and a message on stderr."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
