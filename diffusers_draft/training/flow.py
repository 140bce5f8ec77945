"""Trains the transformer and the text encoder by flow matching, on grids that grow."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..layout import Grid
from .architecture import FLOW_SHIFT
from .autoencoder import encode
from .clips import clips, noise_generator
from .loop import Phase

WITHOUT_CAPTION = 0.1
"""Share of the clips that are learned without a caption, for classifier-free guidance."""


@dataclass(frozen=True)
class Stage:
    """Part of the time.

    Attributes:
        until: the share of the time that has passed when it ends.
        grids: `(T, Y, X)` tokens of the clips, in turn; rows and columns differ between them so that blocks of draft
            attention meet ragged edges too.
        text: tokens that captions are padded to with zeros, at most the pipeline's 512; none of the model's own sizes,
            which `torch.compile` would take for the same thing.
        noises: steps in a row that learn from the same clips, with other noise: drawing and encoding small clips costs
            as much as a step.
    """

    until: float
    grids: tuple[Grid, ...]
    text: int
    noises: int


STAGES = (
    Stage(0.45, ((5, 12, 16), (5, 16, 12), (5, 13, 15)), text=72, noises=4),
    Stage(0.7, ((7, 16, 28), (7, 28, 16), (9, 19, 21)), text=512, noises=4),
    Stage(1.0, ((9, 24, 48), (9, 48, 24), (9, 30, 37), (11, 21, 44)), text=512, noises=2),
)


def flow_phase(pipe: Any, minutes: float, seed: int, tokens: int) -> Phase:
    """The transformer learns the way from noise to the latents of captioned clips.

    As in diffusers' flow-matching schedulers, `x_t = (1 - sigma) x + sigma noise` and the model predicts
    `noise - x`; sigma has the density that the scheduler's steps have.

    Args:
        pipe: the pipeline on the device to train on, with a trained autoencoder.
        minutes: how long.
        seed: of the clips and the noise.
        tokens: of a batch.
    """
    transformer, vae = pipe.transformer.train(), pipe.vae.eval()
    pipe.text_encoder.train()
    encoded = functools.lru_cache(maxsize=1)(functools.partial(_encoded, pipe))

    def step(number: int, share: float) -> Tensor:
        stage = next(stage for stage in STAGES if share < stage.until)
        batch_number = number // stage.noises
        grid = stage.grids[batch_number % len(stage.grids)]
        latents, texts = encoded(grid, max(1, tokens // math.prod(grid)), seed, batch_number)
        random = noise_generator(latents.device, seed, number)
        noise = torch.randn(latents.shape, generator=random, device=latents.device)
        sigma = torch.rand(len(latents), generator=random, device=latents.device)
        sigma = FLOW_SHIFT * sigma / (1 + (FLOW_SHIFT - 1) * sigma)
        noisy = torch.lerp(latents, noise, sigma[:, None, None, None, None])
        with torch.autocast(vae.device.type, torch.bfloat16):
            embeds = embed(pipe, texts, stage.text)
            flow = transformer(noisy, 1000 * sigma, embeds, return_dict=False)[0]
        return functional.mse_loss(flow.float(), noise - latents)

    return Phase("flow", minutes, {"transformer": transformer, "text_encoder": pipe.text_encoder}, 1e-3, step)


def embed(pipe: Any, texts: list[str], length: int) -> Tensor:
    """`(B, length, D)` as `WanPipeline` makes it: zeros where a caption has no token."""
    tokens = pipe.tokenizer(texts, padding=True, return_tensors="pt").to(pipe.text_encoder.device)
    hidden = pipe.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    hidden = hidden * tokens.attention_mask[..., None]
    return functional.pad(hidden, (0, 0, 0, length - hidden.shape[1]))


@torch.no_grad()
def _encoded(pipe: Any, grid: Grid, batch: int, seed: int, number: int) -> tuple[Tensor, list[str]]:
    """Latents `(B, C, T, Y, X)` of clips, and their captions, some of them empty."""
    patch = pipe.transformer.config.patch_size
    frames = 1 + pipe.vae_scale_factor_temporal * (grid[0] - 1)
    height, width = (pipe.vae_scale_factor_spatial * patch[1] * size for size in grid[1:])
    video, texts = clips(pipe.vae.device, batch, (frames, height, width), seed, number)
    every = round(1 / WITHOUT_CAPTION)
    return encode(pipe.vae, video), ["" if (number + at) % every == 0 else text for at, text in enumerate(texts)]
