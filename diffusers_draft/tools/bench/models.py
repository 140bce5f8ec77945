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
        pipeline: makes diffusers' pipeline of a transformer and a scheduler, without text encoder and decoder.
        arguments: makes what stands in for them in the pipeline's call.
    """

    shape: str
    blocks: tuple[tuple[str, str, int], ...]
    build: Callable[..., nn.Module]
    inputs: Callable[[Shape, torch.device, torch.dtype], dict[str, Tensor]]
    scheduler: Callable[[], Any]
    forwards: int
    sparsity: float
    pipeline: Callable[[nn.Module, Any], Any]
    arguments: Callable[[Shape, torch.device, torch.dtype], dict[str, Any]]

    def make(self, device: torch.device, dtype: torch.dtype, blocks: int | None = None) -> Any:
        """Make the transformer with random weights.

        Args:
            device: where.
            dtype: of the weights.
            blocks: how many of each kind; by default as many as it really has.
        """
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                transformer = self.build(**{key: blocks or length for _, key, length in self.blocks})
        finally:
            torch.set_default_dtype(before)
        return transformer.eval().requires_grad_(False)


def _hunyuan(**layers: int) -> nn.Module:
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(**layers)


def _hunyuan_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    frames, rows, columns = shape.grid

    def noise(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=dtype)

    return {
        "hidden_states": noise(shape.batch, 16, frames, 2 * rows, 2 * columns),
        "timestep": torch.full((shape.batch,), 500, device=device),
        "encoder_hidden_states": noise(shape.batch, shape.text, 4096),
        "encoder_attention_mask": _text_mask(shape, device),
        "pooled_projections": noise(shape.batch, 768),
        "guidance": torch.full((shape.batch,), 6000.0, device=device, dtype=dtype),
    }


def _text_mask(shape: Shape, device: torch.device) -> Tensor:
    """Let the first text fill its room, and a second one half of it, as a prompt and a negative one."""
    lengths = torch.tensor([shape.text // (sample + 1) for sample in range(shape.batch)], device=device)
    return torch.arange(shape.text, device=device) < lengths[:, None]


def _hunyuan_pipeline(transformer: nn.Module, scheduler: Any) -> Any:
    from diffusers import HunyuanVideoPipeline

    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return HunyuanVideoPipeline(transformer=transformer, scheduler=scheduler, **parts)


def _size(shape: Shape, channels: int, device: torch.device) -> dict[str, Any]:
    """Make the arguments that every pipeline has; the size in pixels is only checked, as the latents are given."""
    frames, rows, columns = shape.grid
    latents = torch.randn(shape.batch, channels, frames, 2 * rows, 2 * columns, device=device)
    return {"latents": latents, "height": 16 * rows, "width": 16 * columns, "num_frames": 4 * frames - 3}


def _hunyuan_arguments(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    return _size(shape, 16, device) | {
        "prompt_embeds": torch.randn(shape.batch, shape.text, 4096, device=device, dtype=dtype),
        "pooled_prompt_embeds": torch.randn(shape.batch, 768, device=device, dtype=dtype),
        "prompt_attention_mask": _text_mask(shape, device),
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
            "hidden_states": torch.randn(
                shape.batch, channels, frames, 2 * rows, 2 * columns, device=device, dtype=dtype
            ),
            "timestep": torch.full((shape.batch,), 500, device=device),
            "encoder_hidden_states": torch.randn(shape.batch, 512, 4096, device=device, dtype=dtype),
        }

    return inputs


def _wan_pipeline(**config: Any) -> Callable[[nn.Module, Any], Any]:
    def pipeline(transformer: nn.Module, scheduler: Any) -> Any:
        from diffusers import WanPipeline

        parts = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
        return WanPipeline(transformer=transformer, scheduler=scheduler, **parts, **config)

    return pipeline


def _wan_arguments(channels: int) -> Callable[[Shape, torch.device, torch.dtype], dict[str, Any]]:
    def arguments(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        names = "prompt_embeds", "negative_prompt_embeds"
        prompts = {name: torch.randn(shape.batch, 512, 4096, device=device, dtype=dtype) for name in names}
        return _size(shape, channels, device) | prompts

    return arguments


def _flow_scheduler(shift: float) -> Callable[[], Any]:
    def scheduler() -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(shift=shift)

    return scheduler


def _hunyuan_model(shape: str) -> Model:
    blocks = (("transformer_blocks", "num_layers", 20), ("single_transformer_blocks", "num_single_layers", 40))
    scheduler = _flow_scheduler(7.0)
    return Model(shape, blocks, _hunyuan, _hunyuan_inputs, scheduler, 1, 0.9, _hunyuan_pipeline, _hunyuan_arguments)


def _wan_model(
    shape: str, build: Callable[..., nn.Module], layers: int, channels: int, shift: float, **config: Any
) -> Model:
    blocks = (("blocks", "num_layers", layers),)
    run = _wan_pipeline(**config), _wan_arguments(channels)
    return Model(shape, blocks, build, _wan_inputs(channels), _flow_scheduler(shift), 2, 0.75, *run)


MODELS = {
    "hunyuan-13b-768p": _hunyuan_model("hunyuan-768p"),
    "hunyuan-13b-720p": _hunyuan_model("hunyuan-720p"),
    "hunyuan-13b-544p": _hunyuan_model("hunyuan-544p"),
    "hunyuan-custom-13b": _hunyuan_model("hunyuan-custom"),
    "wan-14b-768p": _wan_model("wan-14b-768p", _wan, 40, 16, 5.0),
    "wan-14b-720p": _wan_model("wan-14b-720p", _wan, 40, 16, 5.0),
    "wan-14b-480p": _wan_model("wan-14b-480p", _wan, 40, 16, 3.0),
    "wan-5b-704p": _wan_model("wan-5b-704p", _wan_5b, 30, 48, 5.0, expand_timesteps=True),
}
