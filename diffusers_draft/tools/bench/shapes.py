"""Attention shapes of real models, and random inputs of those shapes."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ...attention.layout import Grid


@dataclass(frozen=True)
class Shape:
    """Sizes of one attention call: `(T, Y, X)` video tokens, then `text` tokens, in `batch` samples."""

    grid: Grid
    heads: int
    head_dim: int
    text: int = 0
    batch: int = 1

    @property
    def video(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def seq_len(self) -> int:
        return self.video + self.text

    @property
    def dense_flops(self) -> int:
        return 4 * self.batch * self.heads * self.head_dim * self.seq_len**2


SHAPES = {
    "hunyuan-768p": Shape((33, 48, 80), 24, 128, text=256),
    "hunyuan-720p": Shape((33, 45, 80), 24, 128, text=256),
    "hunyuan-544p": Shape((33, 34, 60), 24, 128, text=256),
    "hunyuan-custom": Shape((34, 45, 80), 24, 128, text=831, batch=2),
    "wan-14b-768p": Shape((21, 48, 80), 40, 128),
    "wan-14b-720p": Shape((21, 45, 80), 40, 128),
    "wan-14b-480p": Shape((21, 30, 52), 40, 128),
    "wan-5b-704p": Shape((31, 22, 40), 24, 128),
    "cpu-10k": Shape((10, 25, 40), 8, 64),
}


def random_inputs(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    """Draw Gaussian query, key and value, `(B, S, H, D)`: the draft map is flat, the easiest case for a kernel."""
    generator = torch.Generator(device).manual_seed(seed)
    size = (shape.batch, shape.seq_len, shape.heads, shape.head_dim)
    return tuple(torch.randn(size, device=device, generator=generator).to(dtype) for _ in range(3))


def structured_inputs(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    """Draw query, key and value as smooth fields over space and time plus noise, as real models have them.

    Query and key share a field, so that the draft map has peaks; value has its own. White noise as value would average
    to nothing over the skipped keys, so that neither an error against dense attention nor its correction meant
    anything. The error of sparse attention is like that of trained models, about a tenth. Text is noise.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def noise(*size: int) -> Tensor:
        return torch.randn(size, device=device, generator=generator)

    def smooth() -> Tensor:
        coarse = [max(2, size // step) for size, step in zip(shape.grid, (4, 5, 5), strict=True)]
        field = noise(shape.batch, shape.heads * shape.head_dim, *coarse)
        field = interpolate(field, size=shape.grid, mode="trilinear", align_corners=True)
        field = field.flatten(2).transpose(1, 2).unflatten(2, (shape.heads, shape.head_dim))
        return field / field.std(dim=-1, keepdim=True)

    def around(field: Tensor) -> Tensor:
        video = field + 0.6 * noise(*field.shape)
        text = noise(shape.batch, shape.text, shape.heads, shape.head_dim)
        return torch.cat([video, text], dim=1)

    field = smooth()
    query, key, value = (around(field).to(dtype) for field in (field, field, smooth()))
    return query, key, value
