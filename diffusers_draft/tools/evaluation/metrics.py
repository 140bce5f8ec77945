"""Metrics of a video: fidelity to the dense video, and flicker."""

from importlib.util import find_spec

import numpy as np
import torch
from torchmetrics import Metric, MetricCollection
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

HIGHEST_PSNR = 100.0
"""PSNR of equal videos, finite so that means exist."""

FRAMES_AT_ONCE = 8


def fidelity_metrics(*, lpips: bool = False) -> MetricCollection:
    """Make the metrics: PSNR over all pixels of a clip, and means over frames of SSIM and optionally LPIPS (AlexNet).

    Raises:
        ImportError: if torchvision, which LPIPS needs, is missing.
        OSError: if AlexNet's weights are not cached and cannot be downloaded.
    """
    metrics: dict[str, Metric | MetricCollection] = {
        "psnr": PeakSignalNoiseRatio(data_range=1.0),
        "ssim": StructuralSimilarityIndexMeasure(data_range=1.0),
    }
    if lpips:
        if find_spec("torchvision") is None:
            raise ImportError("LPIPS needs torchvision: pip install 'diffusers-draft[lpips]'")
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        try:
            metrics["lpips"] = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
        except OSError as error:
            raise OSError(
                f"LPIPS needs the weights of torchvision's AlexNet, and they could not be fetched ({error}). Put them "
                f"in {torch.hub.get_dir()}/checkpoints, or leave --lpips out."
            ) from error
    return MetricCollection(metrics)


def fidelity(frames: np.ndarray, dense: np.ndarray, metrics: MetricCollection) -> dict[str, float]:
    """Compute the metrics of a video against the dense video.

    Args:
        frames: `(F, H, W, 3)` uint8.
        dense: as `frames`.
        metrics: from `fidelity_metrics`, on the device that computes them.

    Returns:
        The metrics' values by name, PSNR in dB, at most `HIGHEST_PSNR`.
    """
    metrics.reset()
    device = metrics["psnr"].device
    with torch.inference_mode():
        for start in range(0, len(frames), FRAMES_AT_ONCE):
            part = slice(start, start + FRAMES_AT_ONCE)
            metrics.update(*(_images(video[part]).to(device) for video in (frames, dense)))
        values = {name: float(value) for name, value in metrics.compute().items()}
    return values | {"psnr": min(values["psnr"], HIGHEST_PSNR)}


def flicker(frames: np.ndarray) -> float:
    """Compute the mean absolute difference of consecutive frames, in grey levels of 255; 0 for a single frame."""
    pairs = zip(frames[1:], frames[:-1], strict=True)
    differences = [np.abs(after.astype(np.int16) - before).mean() for after, before in pairs]
    return float(np.mean(differences)) if differences else 0.0


def _images(frames: np.ndarray) -> torch.Tensor:
    """Convert `(F, H, W, 3)` uint8 to `(F, 3, H, W)` float32 in [0, 1]."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
