"""Options shared by commands that run a diffusers pipeline: which model, how to load it, arguments of its call."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError

from ..attention.method import Method
from ..tools.generation.loading import Model, device, dtype_of, load
from . import one_line
from .backends import check_runs
from .option_types import finite, rate, whole

CALL = {
    "negative_prompt": "negative_prompt",
    "height": "height",
    "width": "width",
    "frames": "num_frames",
    "steps": "num_inference_steps",
    "guidance_scale": "guidance_scale",
}
"""Command-line option -> argument of the pipeline's call."""

ANY_HEAD_DIM = 64
"""A size that every backend takes: that of the model is not known before it is loaded."""


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `model`, `call` and `image` read."""
    parser.add_argument("--model", required=True, help="hub id or folder of a diffusers pipeline")
    parser.add_argument("--image", type=Path, help="what the video starts from, for image-to-video models")
    parser.add_argument("--negative-prompt", help="what the video shall not show")
    for name, unit in (("height", "in pixels"), ("width", "in pixels"), ("frames", "of the video"), ("steps", "")):
        parser.add_argument(f"--{name}", type=whole(1), metavar="N", help=f"{unit} (default: the pipeline's)".strip())
    parser.add_argument("--guidance-scale", type=finite, metavar="X", help="(default: the pipeline's)")
    parser.add_argument("--fps", type=rate, default=16, help="frames per second of the file (default: 16)")
    parser.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"], help="default: bfloat16, float32 on a CPU"
    )
    parser.add_argument(
        "--offload",
        choices=["none", "model", "sequential"],
        default="none",
        help="keep one model, or one layer, at a time on the accelerator",
    )
    parser.add_argument("--fp8", action="store_true", help="store the transformer's weights in float8")
    parser.add_argument("--compile", action="store_true", help="compile the transformer's repeated blocks")
    parser.add_argument("--vae-tiling", action="store_true", help="decode the video in tiles, to save memory")


def check_backend(args: argparse.Namespace, method: Method) -> None:
    """Check that a backend asked for by name can run on this machine, before a model is loaded.

    Raises:
        CommandError: if its package is missing, or it refuses the device, the dtype or the size of the blocks.
    """
    check_runs(method, device(), dtype_of(model(args)), ANY_HEAD_DIM)


def model(args: argparse.Namespace) -> Model:
    """Describe the model to load, from the options."""
    return Model(
        name=args.model,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        offload=args.offload,
        fp8=args.fp8,
        compile=args.compile,
        vae_tiling=args.vae_tiling,
    )


def call(args: argparse.Namespace) -> dict[str, Any]:
    """Collect the arguments of the pipeline's call that were given as options."""
    return {name: getattr(args, option) for option, name in CALL.items() if getattr(args, option) is not None}


def image(args: argparse.Namespace) -> Image.Image | None:
    """Read the image given as `--image`, upright.

    Raises:
        CommandError: if it is not a readable image.
    """
    if args.image is None:
        return None
    with one_line(OSError, Image.DecompressionBombError):
        return ImageOps.exif_transpose(Image.open(args.image)).convert("RGB")


def loaded(args: argparse.Namespace, prepare: Callable[[Any], None] = lambda pipe: None) -> Any:
    """Load the pipeline given as `--model`.

    Args:
        args: the parsed options.
        prepare: gets the pipeline before it is offloaded or moved to the accelerator.

    Raises:
        CommandError: if the pipeline cannot be loaded or does not fit the other options.
    """
    with one_line(OSError, ValueError, ImportError, SafetensorError, torch.OutOfMemoryError):
        return load(model(args), with_image=args.image is not None, prepare=prepare)
