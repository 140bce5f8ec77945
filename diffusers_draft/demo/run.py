"""One timed run of the demo's pipeline, and how far two videos are apart."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanPipeline
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure


@dataclass(frozen=True)
class Run:
    """A generated video.

    Attributes:
        video: `(F, 3, H, W)` float32 in [0, 1].
        seconds: from the call to the end of the last denoising step, without decoding.
    """

    video: Tensor
    seconds: float


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs torch on one thread, so that what else a small machine does hardly changes the ratio of two times."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def generate(pipe: WanPipeline, inputs: dict[str, Any], steps: int, label: str) -> Run:
    """Runs the pipeline on one thread under a progress bar.

    Args:
        pipe: the demo's pipeline, patched or not.
        inputs: from `demo_inputs`.
        steps: denoising steps.
        label: text of the progress bar.
    """
    ends: list[float] = []

    def on_step_end(pipe: WanPipeline, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        ends.append(time.perf_counter())
        return {}

    pipe.set_progress_bar_config(desc=f"{label:>15}", unit="step")
    with one_thread():
        start = time.perf_counter()
        video = pipe(**inputs, num_inference_steps=steps, output_type="pt", callback_on_step_end=on_step_end).frames[0]
    return Run(video, ends[-1] - start)


def psnr(video: Tensor, other: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two videos with values in [0, 1]; infinite if they are equal."""
    error = (video.double() - other.double()).square().mean().item()
    return -10 * math.log10(error) if error else math.inf


def ssim(video: Tensor, other: Tensor) -> float:
    """Structural similarity of two videos with values in [0, 1], the mean over their frames."""
    value = structural_similarity_index_measure(video, other, data_range=1.0)
    assert isinstance(value, Tensor), "a pair comes only where more is asked for"
    return value.item()
