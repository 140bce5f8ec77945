"""Training of the autoencoder on rendered clips, and the statistics of its latents."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics.functional.image import peak_signal_noise_ratio

from .clips import HELD_OUT, clips
from .loop import Phase

KL_WEIGHT = 1e-4
"""Weight of the KL divergence per latent value: it bounds the latents and is too small to cost detail."""
SIZES = ((9, 96, 96), (17, 96, 128), (9, 128, 96))
"""Frames, height and width of the clips, in turn. Layers of the decoder look two latent frames back: with fewer frames
some weights would never be trained, and later frames of longer clips would break."""
JUDGED = (4, (17, 96, 192))
"""Number and `(F, H, W)` of the clips that latents and reconstruction are measured on."""


def autoencoder_phase(vae: Any, minutes: float, seed: int, pixels: int) -> Phase:
    """Make the training phase of the autoencoder.

    Args:
        vae: an `AutoencoderKLWan` on the device to train on.
        minutes: length of the phase.
        seed: seed of the clips.
        pixels: pixels of a batch, in all frames together.
    """

    def batch(number: int, share: float) -> tuple[Tensor, ...]:
        size = SIZES[number % len(SIZES)]
        return (clips(vae.device, max(1, pixels // math.prod(size)), size, seed, number)[0],)

    def loss(video: Tensor) -> Tensor:
        with torch.autocast(vae.device.type, torch.bfloat16):
            latents = vae.encode(video).latent_dist
            again = vae.decode(latents.sample()).sample
        error = functional.l1_loss(again.float(), video) + functional.mse_loss(again.float(), video)
        distance = 0.5 * (latents.mean.float().square() + latents.var.float() - 1 - latents.logvar.float()).mean()
        return error + KL_WEIGHT * distance

    return Phase("autoencoder", minutes, {"vae": vae.train()}, 2e-3, batch, loss)


@torch.no_grad()
def measure_latents(vae: Any, seed: int) -> None:
    """Measure mean and standard deviation of every latent channel and write them into the autoencoder's config."""
    vae.eval()
    batch, size = JUDGED
    videos = (clips(vae.device, batch, size, seed, HELD_OUT + number)[0] for number in range(8))
    latents = torch.cat([encode(vae, video) for video in videos])
    mean, deviation = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=deviation.tolist())


def encode(vae: Any, video: Tensor) -> Tensor:
    """Encode `(B, 3, F, H, W)` to `(B, C, T, Y, X)` float32, normalised once `measure_latents` has been called."""
    with torch.autocast(vae.device.type, torch.bfloat16):
        latents = vae.encode(video).latent_dist.mode().float()
    mean, deviation = (
        torch.tensor(values, device=latents.device).view(-1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (latents - mean) / deviation


@torch.no_grad()
def reconstruction_psnr(vae: Any, seed: int) -> float:
    """Compute the PSNR in dB of reconstructed held-out clips, over all pixels."""
    batch, size = JUDGED
    video, _ = clips(vae.device, batch, size, seed, HELD_OUT)
    again = vae.decode(vae.encode(video).latent_dist.mode()).sample
    return peak_signal_noise_ratio((again + 1) / 2, (video + 1) / 2, data_range=1.0).item()
