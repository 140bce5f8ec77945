"""One call of a pipeline: its arguments, frames and times."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from .loading import call_parameters, transformers


@dataclass(frozen=True)
class Clip:
    """A generated video.

    Attributes:
        frames: `(F, H, W, 3)` uint8.
        denoising_seconds: time from the beginning of the transformer's first forward to the end of its last.
        seconds: time of the whole call, with text encoding and decoding.
    """

    frames: np.ndarray
    denoising_seconds: float
    seconds: float


def call_arguments(pipe: Any, *, prompt: str, seed: int, image: Image.Image | None = None, **given: Any) -> Any:
    """Make the keyword arguments of a pipeline call.

    Args:
        pipe: a text-to-video or image-to-video pipeline.
        prompt: what the video shall show.
        seed: seed of the noise, which is drawn on the CPU to be the same on every device.
        image: what the video shall start from.
        **given: other arguments by the pipeline's names; None leaves the pipeline's default.

    Raises:
        ValueError: if the pipeline takes no such argument.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if image is not None:
        given["image"] = image
    parameters = call_parameters(type(pipe))
    if unknown := sorted(set(given) - set(parameters)):
        raise ValueError(f"{type(pipe).__name__} takes no {' and no '.join(unknown)}.")
    # HunyuanVideo's models are distilled for guidance and leave the negative prompt unread by default.
    if "negative_prompt" in given and "true_cfg_scale" in parameters:
        raise ValueError(f"{type(pipe).__name__} ignores a negative prompt: its guidance is distilled.")
    return given | {"prompt": prompt, "generator": torch.Generator().manual_seed(seed)}


def run(pipe: Any, arguments: dict[str, Any]) -> Clip:
    """Run the pipeline once and measure its time; the pipeline shows its own progress bar.

    Raises:
        ValueError: if the pipeline refuses the arguments, or the video has values that are not finite.
    """
    starts: list[float] = []
    ends: list[float] = []

    def start(*_: Any) -> None:
        if not starts:
            starts.append(_now())

    hooks = []
    for transformer in transformers(pipe):
        hooks.append(transformer.register_forward_pre_hook(start))
        hooks.append(transformer.register_forward_hook(lambda *_: ends.append(_now())))
    begin = time.perf_counter()
    try:
        video = pipe(**arguments, output_type="np").frames[0]
    finally:
        for hook in hooks:
            hook.remove()
    if not np.isfinite(video).all():
        raise ValueError("The video holds values that are not finite. Try another dtype.")
    seconds = time.perf_counter() - begin
    return Clip((video * 255).round().astype(np.uint8), ends[-1] - starts[0], seconds)


def _now() -> float:
    """Read the clock once the device has done what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()
