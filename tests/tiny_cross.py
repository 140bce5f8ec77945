"""Tiny models of the families whose self-attention holds the video apart from its text."""

import functools
import math
import sys
from types import SimpleNamespace
from typing import Any

import torch
from tiny import RAGGED, Grid, Inputs, build_open, family, latents, random
from torch import Tensor, nn

_HEADS = dict(num_attention_heads=2, attention_head_dim=16, num_layers=3)
_WAN = _HEADS | dict(in_channels=4, out_channels=4, text_dim=8, freq_dim=16, ffn_dim=32, rope_max_seq_len=64)


def _timestep(batch: int, timestep: float) -> Tensor:
    return torch.full((batch,), timestep)


def wan_like_inputs(batch: int = 1, grid: Grid = RAGGED, timestep: float = 500) -> Inputs:
    return {
        "hidden_states": latents(4, batch, grid),
        "timestep": _timestep(batch, timestep),
        "encoder_hidden_states": random(batch, 7, 8),
    }


def forced_inputs(batch: int = 1, grid: Grid = RAGGED, timestep: float = 500) -> Inputs:
    """Diffusion forcing: a timestep for each frame."""
    timesteps = _timestep(batch, timestep)[:, None] * torch.linspace(0, 1, grid[0])
    return wan_like_inputs(batch, grid) | {"timestep": timesteps, "enable_diffusion_forcing": True}


def anyflow_inputs(batch: int = 1, grid: Grid = RAGGED, timestep: float = 500) -> Inputs:
    inputs = wan_like_inputs(batch, grid)
    timesteps = torch.full((batch, grid[0]), timestep)
    return inputs | {
        "hidden_states": inputs["hidden_states"].transpose(1, 2),
        "timestep": timesteps,
        "r_timestep": timesteps - 100,
    }


def packed(batch: int, grid: Grid) -> Tensor:
    frames, rows, columns = grid
    return random(batch, frames * rows * columns, 4)


def ltx_inputs(batch: int = 1, grid: Grid = RAGGED, timestep: float = 500) -> Inputs:
    frames, rows, columns = grid
    return {
        "hidden_states": packed(batch, grid),
        "encoder_hidden_states": random(batch, 7, 8),
        "timestep": _timestep(batch, timestep),
        "encoder_attention_mask": (torch.arange(7) < torch.tensor([[7], [4]])[:batch]).long(),
        "num_frames": frames,
        "height": rows,
        "width": columns,
    }


def raster(grid: Grid, first_frame: float = 0) -> Tensor:
    """`(3, S)` time, row and column of each token."""
    frames, rows, columns = (torch.arange(size).float() for size in grid)
    return torch.stack(torch.meshgrid(frames + first_frame, rows, columns, indexing="ij")).flatten(1)


CONDITIONS: list[tuple[Grid, float]] = [((1, 13, 17), 2), ((2, 5, 7), 1)]
"""Of as many places as the video has, and of fewer."""


def ltx_condition_inputs(batch: int = 1, grid: Grid = RAGGED, timestep: float = 500) -> Inputs:
    """As LTXConditionPipeline: conditions in front, coordinates instead of a grid, a timestep for each token."""
    coords = torch.cat([*(raster(condition, at) for condition, at in CONDITIONS), raster(grid)], dim=1)
    coords = coords * torch.tensor([8 / 25, 32, 32])[:, None]
    inputs = ltx_inputs(batch, grid) | dict(num_frames=None, height=None, width=None)
    return inputs | {
        "hidden_states": random(batch, coords.shape[1], 4),
        "timestep": _timestep(batch, timestep)[:, None].expand(batch, coords.shape[1]),
        "video_coords": coords.expand(batch, -1, -1),
    }


def ltx2_inputs(batch: int = 1, grid: Grid = RAGGED, timestep: float = 500, *, appended: int = 0) -> Inputs:
    """With two audio tokens, and some tokens behind the video."""
    inputs = ltx_inputs(batch, grid, timestep)
    coords = torch.cat([raster(grid), raster((1, 1, appended), first_frame=1)], dim=1)
    coords = torch.stack([coords, coords + 1], dim=-1)
    return inputs | {
        "hidden_states": torch.cat([inputs["hidden_states"], random(batch, appended, 4)], dim=1),
        "audio_hidden_states": random(batch, 2, 4),
        "audio_encoder_hidden_states": random(batch, 7, 8),
        "audio_encoder_attention_mask": inputs["encoder_attention_mask"],
        "audio_num_frames": 2,
        "video_coords": coords.expand(batch, -1, -1, -1),
    }


ltx2_keyframe_inputs = functools.partial(ltx2_inputs, appended=30)


def ltx2_slot_coords(grid: Grid, slots: tuple[int, ...]) -> Tensor:
    """`(3, S, 2)` begins and ends of a video, whose frame 0 is one pixel frame and the others eight, and of slots."""
    coords = raster(grid)
    begins, ends = (8 * coords[0] - 7).clamp(min=0), 8 * coords[0] + 1
    places = coords[1:, : grid[1] * grid[2]]
    at = torch.tensor(slots).repeat_interleave(places.shape[1])
    times = torch.stack([torch.cat([begins, at]), torch.cat([ends, at + 1])], dim=-1) / 24
    places = torch.cat([coords[1:], places.repeat(1, len(slots))], dim=1)
    return torch.cat([times[None], 32 * torch.stack([places, places + 1], dim=-1)])


def ltx2_refined_inputs(batch: int = 1, grid: Grid = RAGGED, timestep: float = 500) -> Inputs:
    """As LTX2DFRPipeline, which gives no grid: behind the video its last pixel frame and one before, as slots."""
    frames, rows, columns = grid
    inputs = ltx2_inputs(batch, grid, timestep, appended=2 * rows * columns)
    coords = ltx2_slot_coords(grid, slots=(8 * frames - 8, 8 * frames - 16))
    no_grid = dict(num_frames=None, height=None, width=None)
    return inputs | no_grid | {"video_coords": coords.expand(batch, -1, -1, -1)}


def kandinsky5_inputs(batch: int = 1, grid: Grid = RAGGED, timestep: float = 500) -> Inputs:
    return {
        "hidden_states": latents(4, batch, grid).movedim(1, -1),
        "encoder_hidden_states": random(batch, 7, 8),
        "timestep": _timestep(batch, timestep),
        "pooled_projections": random(batch, 6),
        "visual_rope_pos": [torch.arange(size) for size in grid],
        "text_rope_pos": torch.arange(7),
    }


def kandinsky6_inputs(batch: int = 1, grid: Grid = RAGGED, timestep: float = 500) -> Inputs:
    inputs = kandinsky5_inputs(batch, grid, timestep)
    del inputs["visual_rope_pos"], inputs["text_rope_pos"]
    return inputs | {"audio_hidden_states": random(batch, 5, 4)}


def kandinsky6_reference_inputs(batch: int = 1, grid: Grid = RAGGED, timestep: float = 500) -> Inputs:
    """As Kandinsky6TI2VAPipeline with an image: a frame behind the video, at the place of the first."""
    frames, rows, columns = grid
    types = torch.tensor([0] * frames + [1])
    return kandinsky6_inputs(batch, (frames + 1, rows, columns), timestep) | {
        "visual_token_type_ids": types.expand(batch, -1),
        "visual_rope_pos": (torch.arange(frames + 1) % frames, torch.arange(rows), torch.arange(columns)),
    }


def cosmos_inputs(batch: int = 1, grid: Grid = RAGGED, timestep: float = 500) -> Inputs:
    return wan_like_inputs(batch, grid, timestep / 1000) | {"fps": 16}


def cosmos_frame_inputs(batch: int = 1, grid: Grid = RAGGED, timestep: float = 500) -> Inputs:
    timesteps = torch.full((batch, 1, grid[0], 1, 1), timestep / 1000)
    return cosmos_inputs(batch, grid) | {"timestep": timesteps}


def cosmos_control_inputs(batch: int = 1, grid: Grid = RAGGED, timestep: float = 500) -> Inputs:
    frames, rows, columns = grid
    inputs = cosmos_inputs(batch, grid, timestep)
    return {
        "controls_latents": latents(4, batch, grid).flip(0),
        "latents": inputs.pop("hidden_states"),
        "condition_mask": torch.ones(batch, 1, frames, 2 * rows, 2 * columns),
        "padding_mask": torch.zeros(1, 1, 2 * rows, 2 * columns),
        **inputs,
    }


def without_torchvision(cls: type[nn.Module], config: dict[str, Any]) -> Any:
    """Stands in for torchvision, which this model needs only to resize a mask."""
    module = sys.modules[cls.__module__]
    if not hasattr(module, "transforms"):

        def resize(mask: Tensor, size: list[int], interpolation: Any) -> Tensor:
            return nn.functional.interpolate(mask, size)

        module.transforms = SimpleNamespace(
            functional=SimpleNamespace(resize=resize), InterpolationMode=SimpleNamespace(NEAREST=None)
        )
    return build_open(cls, config)


_LTX = _HEADS | dict(in_channels=4, out_channels=4, cross_attention_dim=32, caption_channels=8)
_LTX_LAYERS = {"transformer_blocks.*.attn1": 3}
_LTX2 = _LTX | dict(
    audio_in_channels=4,
    audio_out_channels=4,
    audio_num_attention_heads=2,
    audio_attention_head_dim=8,
    audio_cross_attention_dim=16,
)
_KANDINSKY = dict(
    in_visual_dim=4,
    in_text_dim=8,
    in_text_dim2=6,
    time_dim=16,
    out_visual_dim=4,
    model_dim=32,
    ff_dim=32,
    num_text_blocks=1,
    num_visual_blocks=3,
    axes_dims=(4, 6, 6),
)
_KANDINSKY6 = _KANDINSKY | dict(
    visual_cond=False, in_audio_dim=4, out_audio_dim=4, cross_gates=True, fix_modulation=True
)
_COSMOS = _HEADS | dict(
    in_channels=4,
    out_channels=4,
    mlp_ratio=1,
    text_embed_dim=8,
    adaln_lora_dim=4,
    max_size=(8, 64, 64),
    concat_padding_mask=False,
)
_COSMOS_CONTROL = dict(
    n_controlnet_blocks=3,
    in_channels=6,
    latent_channels=6,
    model_channels=32,
    num_attention_heads=2,
    attention_head_dim=16,
    mlp_ratio=1,
    text_embed_dim=8,
    adaln_lora_dim=4,
    max_size=(8, 64, 64),
)

TINY = {
    **family("SkyReelsV2Transformer3DModel", _WAN, wan_like_inputs, {"blocks.*.attn1": 3}),
    **family("SkyReelsV2Transformer3DModel", _WAN, forced_inputs, {"blocks.*.attn1": 3}, " forcing"),
    **family("ChronoEditTransformer3DModel", _WAN, wan_like_inputs, {"blocks.*.attn1": 3}),
    **family("AnyFlowTransformer3DModel", _WAN, anyflow_inputs, {"blocks.*.attn1": 3}),
    **family("LTXVideoTransformer3DModel", _LTX, ltx_inputs, {"transformer_blocks.*.attn1": 3}),
    **family(
        "LTXVideoTransformer3DModel",
        _LTX,
        ltx_condition_inputs,
        {"transformer_blocks.*.attn1": 3},
        " conditions",
        prefix=sum(math.prod(grid) for grid, _ in CONDITIONS),
    ),
    **family("LTX2VideoTransformer3DModel", _LTX2, ltx2_inputs, _LTX_LAYERS),
    **family("LTX2VideoTransformer3DModel", _LTX2, ltx2_keyframe_inputs, _LTX_LAYERS, " keyframes"),
    **family("LTX2VideoTransformer3DModel", _LTX2 | dict(rope_type="split"), ltx2_inputs, _LTX_LAYERS, " split rope"),
    **family("LTX2VideoTransformer3DModel", _LTX2, ltx2_refined_inputs, _LTX_LAYERS, " coordinates"),
    **family(
        "Kandinsky5Transformer3DModel",
        _KANDINSKY,
        kandinsky5_inputs,
        {"visual_transformer_blocks.*.self_attention": 3},
        tolerance=2e-5,  # it rounds queries and keys to bfloat16
    ),
    **family(
        "Kandinsky6Transformer3DModel",
        _KANDINSKY6,
        kandinsky6_inputs,
        {"visual_transformer_blocks.*.video_dec_block.self_attention": 3},
    ),
    **family(
        "Kandinsky6Transformer3DModel",
        _KANDINSKY6 | dict(visual_token_type_num_embeddings=2),
        kandinsky6_reference_inputs,
        {"visual_transformer_blocks.*.video_dec_block.self_attention": 3},
        " reference",
    ),
    **family("CosmosTransformer3DModel", _COSMOS, cosmos_inputs, {"transformer_blocks.*.attn1": 3}),
    **family(
        "CosmosTransformer3DModel",
        _COSMOS | dict(extra_pos_embed_type=None),
        cosmos_frame_inputs,
        {"transformer_blocks.*.attn1": 3},
        " per frame",
    ),
    **family(
        "CosmosControlNetModel",
        _COSMOS_CONTROL,
        cosmos_control_inputs,
        {"control_blocks.*.attn1": 3},
        builder=without_torchvision,
    ),
}
