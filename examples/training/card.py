"""The model card: how the model was trained, its loss curves, samples, and held-out prompts."""

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from diffusers_draft import __version__
from diffusers_draft.tools.bench.measure import environment
from diffusers_draft.tools.demo.scenes import captions
from diffusers_draft.tools.generation.run import call_arguments, run

from .checkpoint import Progress
from .clips import HELD_OUT, scenes
from .flow import USES

PROMPTS = 64
SAMPLES = 8
SHOWN = 4
"""Frames of each sample that the card shows."""
HEIGHT, WIDTH, FRAMES, STEPS, GUIDANCE = 192, 384, 17, 25, 3.0

TEXT = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
---

# The demo's model

A small Wan pipeline, all of whose classes are those of diffusers and transformers: {parameters:,} parameters in
bfloat16. It makes short clips of shapes that move over a pattern, from captions such as

> {caption}

It exists to try draft attention and to measure what it costs. It knows nothing else of the world.

![Samples, {shown} frames each](samples.jpg)

*The first {samples} captions of `prompts.txt`, which it was not trained on; {frames} frames of {height} x {width}
pixels in {steps} steps with guidance {guidance:g}.*

## Training

- Data: clips drawn by `diffusers_draft.tools.demo.drawing` from random scenes, seed {seed}. The autoencoder sees
  each once, the transformer about {uses} times with other noise.
- Autoencoder: {autoencoder_steps:,} steps in {autoencoder_minutes:.1f} minutes. It gives clips back with a PSNR of
  {psnr:.1f} dB.
- Transformer and text encoder: {flow_steps:,} steps in {flow_minutes:.1f} minutes of flow matching, about
  {tokens:,} tokens a step, first on pictures, then on clips of grids that grow up to 9 x 24 x 48 tokens; a tenth
  of them without a caption. Muon and AdamW, moving average of the weights.
- Device: {device}; diffusers-draft {version}{commit}, torch {torch}, diffusers {diffusers}, Python {python}.
- Command: `{command}`

![Loss of the autoencoder and of the flow](loss.png)
"""


def write_card(folder: Path, pipe: Any, training: Any, learned: dict[str, Progress], psnr: float) -> None:
    """Write README.md, samples.jpg, loss.png and prompts.txt beside the pipeline.

    Args:
        folder: the pipeline's folder.
        pipe: the trained pipeline on its device.
        training: the options of the training.
        learned: progress of both phases, by name.
        psnr: PSNR of the autoencoder in dB.
    """
    prompts = captions(scenes(PROMPTS, HEIGHT, WIDTH, training.seed, HELD_OUT + 100))
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
    contact_sheet(pipe, prompts[:SAMPLES]).save(folder / "samples.jpg", quality=90)
    _loss_curves(learned).savefig(folder / "loss.png", dpi=100)
    parts = (pipe.vae, pipe.transformer, pipe.text_encoder)
    facts: dict[str, Any] = {
        "parameters": sum(parameter.numel() for part in parts for parameter in part.parameters()),
        "caption": prompts[0],
        "samples": SAMPLES,
        "shown": SHOWN,
        "frames": FRAMES,
        "height": HEIGHT,
        "width": WIDTH,
        "steps": STEPS,
        "guidance": GUIDANCE,
        "seed": training.seed,
        "tokens": training.tokens,
        "uses": USES,
        "psnr": psnr,
        "version": __version__,
        "commit": _commit(),
        **environment(pipe.device),
        "command": shlex.join(["python", "-m", "examples.training", *sys.argv[1:]]),
    }
    for name, progress in learned.items():
        facts |= {f"{name}_steps": progress.steps, f"{name}_minutes": progress.seconds / 60}
    (folder / "README.md").write_text(TEXT.format(**facts))


def contact_sheet(pipe: Any, prompts: list[str]) -> Image.Image:
    """Draw a row of frames for each prompt, from the video's first to its last."""
    pipe.set_progress_bar_config(leave=False)
    rows = []
    for number, prompt in enumerate(prompts):
        arguments = call_arguments(
            pipe,
            prompt=prompt,
            seed=number,
            num_frames=FRAMES,
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
        )
        frames = run(pipe, arguments).frames
        shown = frames[np.linspace(0, len(frames) - 1, SHOWN).round().astype(int)]
        rows.append(np.concatenate(list(shown), axis=1))
    return Image.fromarray(np.concatenate(rows))


def _loss_curves(learned: dict[str, Progress]) -> Figure:
    """Plot the loss of each phase against its steps."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, (name, progress) in zip(figure.subplots(1, len(learned)), learned.items(), strict=True):
        steps, losses = zip(*progress.losses, strict=True) if progress.losses else ((), ())
        axes.plot(steps, losses, linewidth=0.8)
        axes.set(title=name, xlabel="step", ylabel="loss", yscale="log")
        axes.locator_params(axis="x", nbins=5)
    return figure


def _commit() -> str:
    """Return the commit of the checkout in brackets, or an empty string without git."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f" ({found.stdout.strip()})"
