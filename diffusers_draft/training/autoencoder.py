"""Trains the autoencoder on clips of scenes, and measures the latents' mean and deviation."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .clips import HELD_OUT, clips
from .loop import Phase

KL_WEIGHT = 1e-4
"""Of the distance to the normal distribution, for each number of the latents: keeps their size, costs no detail."""
FRAMES = 5
SIZES = ((64, 64), (96, 128), (128, 96))
"""Heights and widths of the clips, in turn."""


def autoencoder_phase(vae: Any, minutes: float, seed: int, pixels: int) -> Phase:
    """The autoencoder learns to give clips back.

    Args:
        vae: an `AutoencoderKLWan` on the device to train on.
        minutes: how long.
        seed: of the clips.
        pixels: of a batch, in all frames together.
    """

    def step(number: int, share: float) -> Tensor:
        height, width = SIZES[number % len(SIZES)]
        batch = max(1, pixels // (height * width * FRAMES))
        video, _ = clips(vae.device, batch, (FRAMES, height, width), seed, number)
        with torch.autocast(vae.device.type, torch.bfloat16):
            latents = vae.encode(video).latent_dist
            again = vae.decode(latents.sample()).sample
        error = functional.l1_loss(again.float(), video) + functional.mse_loss(again.float(), video)
        size = 0.5 * (latents.mean.float().square() + latents.var.float() - 1 - latents.logvar.float()).mean()
        return error + KL_WEIGHT * size

    return Phase("autoencoder", minutes, {"vae": vae.train()}, 4e-3, step)


@torch.no_grad()
def measure_latents(vae: Any, seed: int) -> None:
    """Writes the mean and the deviation of every latent channel into the autoencoder's config, for the pipeline."""
    vae.eval()
    videos = (clips(vae.device, 32, (5, 64, 64), seed, HELD_OUT + number)[0] for number in range(2))
    latents = torch.cat([encode(vae, video) for video in videos])
    mean, deviation = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=deviation.tolist())


def encode(vae: Any, video: Tensor) -> Tensor:
    """`(B, 3, F, H, W)` to latents `(B, C, T, Y, X)` float32, normalised once `measure_latents` has been called."""
    with torch.autocast(vae.device.type, torch.bfloat16):
        latents = vae.encode(video).latent_dist.mode().float()
    mean, deviation = (
        torch.tensor(values, device=latents.device).view(-1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (latents - mean) / deviation


@torch.no_grad()
def reconstruction_psnr(vae: Any, seed: int) -> float:
    """PSNR in dB of clips that the autoencoder gives back, over all pixels of 8 clips it was not trained on."""
    video, _ = clips(vae.device, 8, (9, 96, 192), seed, HELD_OUT)
    again = vae.decode(vae.encode(video).latent_dist.mode()).sample
    return 10 * math.log10(4 / functional.mse_loss(again, video).item())  # values from -1 to 1
