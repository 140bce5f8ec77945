"""Transformers to benchmark: real classes at their real width, built with few blocks and random weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .shapes import Shape


@dataclass(frozen=True)
class Model:
    """How to build a transformer, its inputs and its schedule.

    Attributes:
        shape: name of its attention shape in `SHAPES`.
        blocks: for each kind of block, its module list, the config key of its length and the real length.
        build: makes the transformer, given the number of blocks of each kind.
        inputs: makes the arguments of a forward.
        scheduler: makes the scheduler.
        forwards: forwards for each step (2 with classifier-free guidance).
        sparsity: the sparsity that the paper uses for it.
    """

    shape: str
    blocks: tuple[tuple[str, str, int], ...]
    build: Callable[..., nn.Module]
    inputs: Callable[[Shape, torch.device, torch.dtype], dict[str, Tensor]]
    scheduler: Callable[[], Any]
    forwards: int
    sparsity: float


def _hunyuan(**layers: int) -> nn.Module:
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(**layers)


def _hunyuan_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    frames, rows, columns = shape.grid

    def noise(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=dtype)

    return {
        "hidden_states": noise(1, 16, frames, 2 * rows, 2 * columns),
        "timestep": torch.full((1,), 500, device=device),
        "encoder_hidden_states": noise(1, shape.text, 4096),
        "encoder_attention_mask": torch.ones(1, shape.text, dtype=torch.bool, device=device),
        "pooled_projections": noise(1, 768),
        "guidance": torch.full((1,), 6000.0, device=device, dtype=dtype),
    }


def _wan(**config: int) -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(**config)


def _wan_5b(**config: int) -> nn.Module:
    return _wan(num_attention_heads=24, ffn_dim=14336, in_channels=48, out_channels=48, **config)


def _wan_inputs(channels: int) -> Callable[[Shape, torch.device, torch.dtype], dict[str, Tensor]]:
    def inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        frames, rows, columns = shape.grid
        return {
            "hidden_states": torch.randn(1, channels, frames, 2 * rows, 2 * columns, device=device, dtype=dtype),
            "timestep": torch.full((1,), 500, device=device),
            "encoder_hidden_states": torch.randn(1, 512, 4096, device=device, dtype=dtype),
        }

    return inputs


def _flow_scheduler(shift: float) -> Callable[[], Any]:
    def scheduler() -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(shift=shift)

    return scheduler


def _hunyuan_model(shape: str) -> Model:
    blocks = (("transformer_blocks", "num_layers", 20), ("single_transformer_blocks", "num_single_layers", 40))
    return Model(shape, blocks, _hunyuan, _hunyuan_inputs, _flow_scheduler(7.0), 1, 0.9)


def _wan_model(shape: str, build: Callable[..., nn.Module], layers: int, channels: int, shift: float) -> Model:
    blocks = (("blocks", "num_layers", layers),)
    return Model(shape, blocks, build, _wan_inputs(channels), _flow_scheduler(shift), 2, 0.75)


MODELS = {
    "hunyuan-13b-768p": _hunyuan_model("hunyuan-768p"),
    "hunyuan-13b-544p": _hunyuan_model("hunyuan-544p"),
    "wan-14b-768p": _wan_model("wan-14b-768p", _wan, 40, 16, 5.0),
    "wan-14b-480p": _wan_model("wan-14b-480p", _wan, 40, 16, 3.0),
    "wan-5b-704p": _wan_model("wan-5b-704p", _wan_5b, 30, 48, 5.0),
}
