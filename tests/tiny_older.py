"""Tiny models of the families whose stock processors call `F.scaled_dot_product_attention` or are replaced."""

from typing import Any

import torch
from tiny import RAGGED, TEXT_SLOTS, Grid, Inputs, family, latents, random
from tiny_joint import padded_text, without_padding
from torch import Tensor

_LAYERS = {"transformer_blocks.*.attn1": 3}
_HEADS = dict(num_attention_heads=2, attention_head_dim=16, num_layers=3)


def rotary(grid: Grid, head_dim: int = 16) -> tuple[Tensor, Tensor]:
    """Any rotation will do, if it is one."""
    frames, rows, columns = grid
    angles = random(frames * rows * columns, head_dim // 2).repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


def cogvideox_inputs(batch: int = 1, grid: Grid = RAGGED, timestep: float = 500) -> Inputs:
    return {
        "hidden_states": latents(4, batch, grid).transpose(1, 2),
        "encoder_hidden_states": random(batch, TEXT_SLOTS, 8),
        "timestep": torch.full((batch,), timestep),
        "image_rotary_emb": rotary(grid),
    }


def cogvideox15_inputs(batch: int = 1, grid: Grid = RAGGED, timestep: float = 500) -> Inputs:
    """Patches of two frames."""
    frames, rows, columns = grid
    hidden_states = latents(4, batch, (2 * frames, rows, columns)).transpose(1, 2)
    return cogvideox_inputs(batch, grid, timestep) | {"hidden_states": hidden_states}


def mochi_inputs(batch: int = 1, grid: Grid = RAGGED, timestep: float = 500) -> Inputs:
    return {
        "hidden_states": latents(4, batch, grid),
        "timestep": torch.full((batch,), timestep),
        **padded_text(batch),
    }


def mochi_gap_inputs(batch: int = 1, grid: Grid = RAGGED, timestep: float = 500) -> Inputs:
    """Padding in front of a text and between two, with fewer and with more valid tokens than lie in front."""
    rows = ("001110111100", "111001100000")[:batch]
    mask = torch.tensor([[int(digit) for digit in row] for row in rows])
    return mochi_inputs(batch, grid, timestep) | {"encoder_attention_mask": mask}


def allegro_inputs(batch: int = 1, grid: Grid = RAGGED, timestep: float = 500) -> Inputs:
    return mochi_inputs(batch, grid, timestep)


def easyanimate_inputs(batch: int = 1, grid: Grid = RAGGED, timestep: float = 500) -> Inputs:
    return {
        "hidden_states": latents(4, batch, grid),
        "timestep": torch.full((batch,), timestep),
        "encoder_hidden_states": random(batch, TEXT_SLOTS, 8),
        "encoder_hidden_states_t5": random(batch, 5, 8),
    }


def hunyuan_video15_inputs(batch: int = 1, grid: Grid = RAGGED, timestep: float = 500) -> Inputs:
    """Text to video: its image embeddings are zero."""
    frames, rows, columns = grid
    return {
        "hidden_states": random(batch, 4, frames, rows, columns),
        "timestep": torch.full((batch,), float(timestep)),
        "encoder_hidden_states_2": random(batch, 6, 10),
        "encoder_attention_mask_2": (torch.arange(6) < torch.tensor([[2], [6]])[:batch]).long(),
        "image_embeds": torch.zeros(batch, 3, 7),
        **padded_text(batch),
    }


def hunyuan_video15_image_inputs(batch: int = 1, grid: Grid = RAGGED, timestep: float = 500) -> Inputs:
    return hunyuan_video15_inputs(batch, grid, timestep) | {"image_embeds": random(batch, 3, 7)}


def hunyuan_video15_lengths(inputs: Inputs, seq_len: int) -> Tensor:
    padding = (inputs["encoder_attention_mask_2"] == 0).sum(dim=1)
    images = 0 if inputs["image_embeds"].any() else inputs["image_embeds"].shape[1]
    return without_padding(inputs, seq_len) - padding - images


_COGVIDEOX = _HEADS | dict(
    in_channels=4,
    out_channels=4,
    time_embed_dim=8,
    text_embed_dim=8,
    max_text_seq_length=TEXT_SLOTS,
    use_rotary_positional_embeddings=True,
)
_MOCHI = _HEADS | dict(
    in_channels=4, pooled_projection_dim=8, text_embed_dim=8, time_embed_dim=8, max_sequence_length=TEXT_SLOTS
)
_ALLEGRO = _HEADS | dict(cross_attention_dim=32, caption_channels=8, sample_height=16, sample_width=16)
_EASYANIMATE = _HEADS | dict(
    in_channels=4,
    out_channels=4,
    patch_size=2,
    mmdit_layers=2,
    time_embed_dim=8,
    text_embed_dim=8,
    text_embed_dim_t5=8,
    add_norm_text_encoder=True,
)
_HUNYUAN_VIDEO15 = _HEADS | dict(
    in_channels=4,
    out_channels=4,
    num_refiner_layers=1,
    text_embed_dim=8,
    text_embed_2_dim=10,
    image_embed_dim=7,
    rope_axes_dim=(4, 6, 6),
)

TINY: dict[str, Any] = {
    **family("CogVideoXTransformer3DModel", _COGVIDEOX, cogvideox_inputs, _LAYERS, prefix=TEXT_SLOTS),
    **family(
        "CogVideoXTransformer3DModel",
        _COGVIDEOX | dict(patch_size_t=2, patch_bias=False),
        cogvideox15_inputs,
        _LAYERS,
        case=" 1.5",
        prefix=TEXT_SLOTS,
    ),
    **family("ConsisIDTransformer3DModel", _COGVIDEOX, cogvideox_inputs, _LAYERS, prefix=TEXT_SLOTS),
    **family("MochiTransformer3DModel", _MOCHI, mochi_inputs, _LAYERS),
    **family("MochiTransformer3DModel", _MOCHI, mochi_gap_inputs, _LAYERS, case=" gaps"),
    **family("AllegroTransformer3DModel", _ALLEGRO, allegro_inputs, _LAYERS),
    **family("EasyAnimateTransformer3DModel", _EASYANIMATE, easyanimate_inputs, _LAYERS, prefix=TEXT_SLOTS + 5),
    **family(
        "HunyuanVideo15Transformer3DModel",
        _HUNYUAN_VIDEO15,
        hunyuan_video15_inputs,
        {"transformer_blocks.*.attn": 3},
        lengths=hunyuan_video15_lengths,
        dense_layers=(),
    ),
    **family(
        "HunyuanVideo15Transformer3DModel",
        _HUNYUAN_VIDEO15,
        hunyuan_video15_image_inputs,
        {"transformer_blocks.*.attn": 3},
        case=" image",
        lengths=hunyuan_video15_lengths,
        dense_layers=(),
    ),
}
