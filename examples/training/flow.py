"""Training of transformer and text encoder by flow matching, on images and then on clips of growing size."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .architecture import FLOW_SHIFT
from .autoencoder import encode
from .clips import clips, noise_generator
from .loop import Phase

Grid = tuple[int, int, int]
"""`(T, Y, X)` in tokens."""
WITHOUT_CAPTION = 0.1
"""Share of the clips that are trained without a caption, for classifier-free guidance."""
USES = 8
"""Average number of steps that use a clip, each with new noise: drawing and encoding it takes as long as a step."""
WINDOW = 16
"""Number of newest batches of a grid that a step samples its clips from."""


@dataclass(frozen=True)
class Stage:
    """A stage of the training.

    Attributes:
        until: share of the total time at which the stage ends.
        grids: grids of the clips, in turn. Some are not multiples of a tile, so that blocks of draft attention get
            ragged edges; rows and columns are even, as `WanPipeline` requires.
        text: tokens that captions are padded to with zeros, at most the pipeline's 512. It differs from all sizes of
            the model, because `torch.compile` would treat equal sizes as one; so the first grid is not square.
    """

    until: float
    grids: tuple[Grid, ...]
    text: int


STAGES = (
    Stage(0.2, ((1, 12, 20), (1, 20, 12), (1, 16, 16)), text=72),
    Stage(0.3, ((1, 24, 48), (1, 48, 24), (1, 30, 38)), text=72),
    Stage(0.5, ((5, 16, 16), (5, 12, 20), (5, 20, 12)), text=72),
    Stage(0.7, ((7, 16, 28), (7, 28, 16), (9, 18, 22)), text=512),
    Stage(1.0, ((9, 24, 48), (9, 48, 24), (9, 30, 38), (11, 22, 44)), text=512),
)
"""Stages in order. Images come first: they teach shapes, colours and words with a fifth of the tokens of a clip."""

LONGEST = 48
"""Number of tokens that captions are tokenized to, enough for the longest one."""


def flow_phase(pipe: Any, minutes: float, seed: int, tokens: int) -> Phase:
    """Make the training phase of transformer and text encoder, by flow matching on latents of captioned clips.

    As in diffusers' flow-matching schedulers, `x_t = (1 - sigma) x + sigma noise` and the model predicts
    `noise - x`; sigma has the density that the scheduler's steps have.

    Args:
        pipe: the pipeline on the device to train on, with a trained autoencoder.
        minutes: length of the phase.
        seed: seed of clips and noise.
        tokens: tokens of a batch.
    """
    transformer, vae = pipe.transformer.train(), pipe.vae.eval()
    pipe.text_encoder.train()
    kept = WINDOW * max(len(stage.grids) for stage in STAGES)
    encoded = functools.lru_cache(maxsize=kept)(functools.partial(_encoded, pipe))

    def batch(number: int, share: float) -> tuple[Tensor, ...]:
        stage = next(stage for stage in STAGES if share < stage.until)
        turn, place = divmod(number, len(stage.grids))
        grid = stage.grids[place]
        size = max(1, tokens // math.prod(grid))
        newest = turn // USES
        made = [len(stage.grids) * old + place for old in range(max(0, newest - WINDOW + 1), newest + 1)]
        window = [encoded(grid, size, seed, old) for old in made]
        random = noise_generator(vae.device, seed, number)
        chosen = torch.randint(size * len(window), (size,), generator=random, device=vae.device)
        latents, ids, mask = (torch.cat(parts)[chosen] for parts in zip(*window, strict=True))
        noise = torch.randn(latents.shape, generator=random, device=latents.device)
        sigma = torch.rand(len(latents), generator=random, device=latents.device)
        sigma = FLOW_SHIFT * sigma / (1 + (FLOW_SHIFT - 1) * sigma)
        noisy = torch.lerp(latents, noise, sigma[:, None, None, None, None])
        mask = functional.pad(mask, (0, stage.text - mask.shape[1]))
        return noisy, noise - latents, 1000 * sigma, ids, mask

    def loss(noisy: Tensor, expected: Tensor, timestep: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        with torch.autocast(vae.device.type, torch.bfloat16):
            flow = transformer(noisy, timestep, embed(pipe, ids, mask), return_dict=False)[0]
        return functional.mse_loss(flow.float(), expected)

    modules = {"transformer": transformer, "text_encoder": pipe.text_encoder}
    # Muon trains the blocks' linear weights; AdamW trains biases, norms, modulations and the layers at both ends.
    matrices = [parameter for parameter in pipe.transformer.blocks.parameters() if parameter.dim() == 2]
    return Phase("flow", minutes, modules, 2e-3, batch, loss, matrices)


def tokenized(pipe: Any, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Tokenize texts: return token ids and their mask, `(B, LONGEST)` each, on the pipeline's device."""
    tokens = pipe.tokenizer(texts, padding="max_length", max_length=LONGEST, return_tensors="pt")
    return tokens.input_ids.to(pipe.device), tokens.attention_mask.to(pipe.device)


def embed(pipe: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Encode `tokenized` texts as `WanPipeline` does: `(B, L, D)`, where the `(B, L)` mask may be padded further."""
    own = ids.shape[1]
    hidden = pipe.text_encoder(ids, mask[:, :own]).last_hidden_state
    return functional.pad(hidden, (0, 0, 0, mask.shape[1] - own)) * mask[..., None]


@torch.no_grad()
def _encoded(pipe: Any, grid: Grid, batch: int, seed: int, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw clips; return their latents `(B, C, T, Y, X)` and their tokenized captions, some of them empty."""
    patch = pipe.transformer.config.patch_size
    frames = 1 + pipe.vae_scale_factor_temporal * (grid[0] - 1)
    height, width = (pipe.vae_scale_factor_spatial * patch[1] * size for size in grid[1:])
    video, texts = clips(pipe.vae.device, batch, (frames, height, width), seed, number)
    every = round(1 / WITHOUT_CAPTION)
    texts = ["" if (number + at) % every == 0 else text for at, text in enumerate(texts)]
    return encode(pipe.vae, video), *tokenized(pipe, texts)
