"""The command `diffusers-draft demo`: generate one small video dense and with draft attention, side by side."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from .. import DraftConfig, enable_draft_attention
from . import CommandError, one_line
from .option_types import seed, whole
from .outputs import check_output, write_output
from .packages import check_packages
from .ranks import check_alone

FPS = 8
VIDEO = "dense-and-draft.mp4"
GIF = "dense-and-draft.gif"
PICTURE = "draft-map.png"
GUIDANCE = 3.0
TILE = (4, 2, 4)
"""Tokens of a block, fewer than by default: this small video has only 51 blocks of the default size, a real video
about a thousand."""
PROMPT = "a big white dotted circle bouncing over green checks, camera pans right"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `demo` to the command line."""
    parser = subparsers.add_parser(
        "demo",
        help="generate a small video dense and with draft attention",
        description="Generates a small video on the CPU, dense and with draft attention from the same seed, with the "
        f"model that comes with the package. Writes {VIDEO}, {GIF} and {PICTURE}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--prompt", default=PROMPT, help="in the words that the model knows")
    parser.add_argument("--sparsity", type=float, default=0.85, help="mean share of the video block pairs to skip")
    parser.add_argument("--steps", type=whole(1), default=14, help="denoising steps")
    parser.add_argument("--seed", type=seed, default=0, help="seed of the noise")
    parser.add_argument("--frames", type=int, default=17, help="frames of the video, an odd number")
    parser.add_argument("--height", type=int, default=160, help="height in pixels, a multiple of 16")
    parser.add_argument("--width", type=int, default=288, help="width in pixels, a multiple of 16")
    parser.add_argument("--output", type=Path, default=Path("out"), metavar="DIR", help="where the files go")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Generate the two videos, print the report and their fidelity, and write the files.

    Raises:
        CommandError: for arguments out of range, a missing package or a folder that cannot be written.
    """
    check_alone("demo")
    config = _checked_config(args)
    check_packages("demo", "imageio", "imageio_ffmpeg", "transformers", "ftfy", "matplotlib", "torchmetrics")
    from ..tools.demo import model, pictures
    from ..tools.demo.capture import captured
    from ..tools.evaluation.metrics import fidelity, fidelity_metrics
    from ..tools.generation.run import Clip, call_arguments
    from ..tools.generation.run import run as generate
    from ..tools.generation.video import check_writable, write_video

    with one_line(OSError, ValueError):
        model.check_prompt(args.prompt)
        check_writable(args.output / VIDEO, FPS)
    for name in (GIF, PICTURE):
        check_output(args.output / name)

    pipe = model.demo_pipeline()
    options: dict[str, Any] = {"num_frames": args.frames, "height": args.height, "width": args.width}
    options |= {"num_inference_steps": args.steps, "guidance_scale": GUIDANCE}

    def clip(label: str) -> Clip:
        pipe.set_progress_bar_config(desc=f"{label:>15}", unit="step")
        return generate(pipe, call_arguments(pipe, prompt=args.prompt, seed=args.seed, **options))

    with captured(pipe.transformer, "blocks.1.attn1") as tensors:
        dense = clip("dense")
    with enable_draft_attention(pipe, config=config) as handle:
        draft = clip("draft attention")
        report = handle.report()

    times = [made.denoising_seconds for made in (dense, draft)]
    likeness = fidelity(draft.frames, dense.frames, fidelity_metrics())
    grid, density = report.transformers[0].grid, report.transformers[0].density
    assert grid is not None and density is not None  # it has just run
    print(report)
    print(f"Denoising: {times[0]:.1f} s dense, {times[1]:.1f} s with draft attention: {times[0] / times[1]:.1f}x.")
    print(f"The two videos: PSNR {likeness['psnr']:.1f} dB, SSIM {likeness['ssim']:.3f}.")

    captions = (f"dense, {times[0]:.1f} s", f"draft attention, density {density:.2f}, {times[1]:.1f} s")
    pairs = pictures.side_by_side((dense.frames, draft.frames), captions)
    with one_line(OSError):
        write_video(np.stack([np.asarray(pair) for pair in pairs]), args.output / VIDEO, FPS)
    gif: dict[str, Any] = {"save_all": True, "append_images": pairs[1:], "duration": 1000 // FPS, "loop": 0}
    write_output(args.output / GIF, lambda path: pairs[0].save(path, **gif))
    write_output(args.output / PICTURE, pictures.draft_picture(tensors, grid, dense.frames, config).save)
    print(f"Wrote {VIDEO}, {GIF} and {PICTURE} in {args.output}.")


def _checked_config(args: argparse.Namespace) -> DraftConfig:
    try:
        config = DraftConfig(sparsity=args.sparsity, tile=TILE)
    except ValueError as error:
        raise CommandError(str(error)) from error
    if args.frames < 1 or args.frames % 2 == 0:
        raise CommandError(f"--frames must be an odd number from 1 on, got {args.frames}")
    for name in ("height", "width"):
        size = getattr(args, name)
        if size < 16 or size % 16:
            raise CommandError(f"--{name} must be a multiple of 16 pixels, got {size}")
    block = config.block
    tokens = (args.frames + 1) // 2 * (args.height // 8) * (args.width // 8)
    if tokens < 2 * block:
        raise CommandError(
            f"the video has {tokens} tokens, but it takes {2 * block} to have two blocks to choose from: raise "
            "--frames, --height or --width"
        )
    return config
