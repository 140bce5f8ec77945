"""Tiny models of the families whose self-attention holds text, history or audio beside the video."""

import math
from typing import Any

import torch
from tiny import RAGGED, TEXT_SLOTS, Grid, Inputs, family, latents, random
from torch import Tensor

_HEADS = dict(num_attention_heads=2, attention_head_dim=16)
_ROPE = dict(rope_axes_dim=(4, 6, 6))


def padded_text(batch: int) -> Inputs:
    """Right-padded: every sample has four valid slots less than the one before."""
    lengths = torch.tensor([TEXT_SLOTS - 4 * sample for sample in range(batch)])
    return {
        "encoder_hidden_states": random(batch, TEXT_SLOTS, 8),
        "encoder_attention_mask": (torch.arange(TEXT_SLOTS) < lengths[:, None]).long(),
    }


def without_padding(inputs: Inputs, seq_len: int) -> Tensor:
    return seq_len - (inputs["encoder_attention_mask"] == 0).sum(dim=1)


def motif_inputs(batch: int = 1, grid: Grid = RAGGED, timestep: float = 500) -> Inputs:
    return {
        "hidden_states": latents(4, batch, grid),
        "timestep": torch.full((batch,), timestep),
        "image_embeds": random(batch, 5, 6),
        **padded_text(batch),
    }


def motif_unmasked_inputs(batch: int = 1, grid: Grid = RAGGED, timestep: float = 500) -> Inputs:
    return motif_inputs(batch, grid, timestep) | {"encoder_attention_mask": None, "image_embeds": None}


def motif_lengths(inputs: Inputs, seq_len: int) -> Tensor | None:
    """The decoder's layers hold two videos and no text."""
    return None if seq_len == 2 * math.prod(RAGGED) else without_padding(inputs, seq_len)


def history(batch: int, grid: Grid, frames: dict[str, int]) -> Inputs:
    """Latents and their frame indices, as FramePack and Helios take them."""
    inputs: Inputs = {}
    for name, count in frames.items():
        inputs[name] = latents(4, batch, (count, *grid[1:]))
        inputs[f"indices_{name}"] = torch.arange(count)
    return inputs


FRAMEPACK_HISTORY = {"latents_clean": 1, "latents_history_2x": 3, "latents_history_4x": 5}
HELIOS_HISTORY = {"latents_history_short": 2, "latents_history_mid": 3, "latents_history_long": 5}
HISTORY_TOKENS = {"framepack": 1 * 13 * 17 + 2 * 7 * 9 + 2 * 4 * 5, "helios": 2 * 13 * 17 + 2 * 7 * 9 + 2 * 4 * 5}


def framepack_inputs(batch: int = 1, grid: Grid = RAGGED, timestep: float = 500) -> Inputs:
    return {
        "hidden_states": latents(4, batch, grid),
        "timestep": torch.full((batch,), timestep),
        "pooled_projections": random(batch, 8),
        "image_embeds": random(batch, 3, 6),
        "indices_latents": torch.arange(9, 9 + grid[0]),
        "guidance": torch.full((batch,), 6000.0),
        **padded_text(batch),
        **history(batch, grid, FRAMEPACK_HISTORY),
    }


def framepack_lengths(inputs: Inputs, seq_len: int) -> Tensor | None:
    """The text of a single sample is cut to its length."""
    return without_padding(inputs, seq_len) if len(inputs["hidden_states"]) > 1 else None


def helios_inputs(batch: int = 1, grid: Grid = RAGGED, timestep: float = 500) -> Inputs:
    of_history = history(batch, grid, HELIOS_HISTORY)
    indices = {name: value.expand(batch, -1) for name, value in of_history.items() if name.startswith("indices")}
    return {
        "hidden_states": latents(4, batch, grid),
        "timestep": torch.full((batch,), timestep),
        "encoder_hidden_states": random(batch, 7, 8),
        "indices_hidden_states": torch.arange(9, 9 + grid[0]).expand(batch, -1),
        **of_history,
        **indices,
    }


def helios_first_chunk(batch: int = 1, grid: Grid = RAGGED, timestep: float = 500) -> Inputs:
    inputs = helios_inputs(batch, grid, timestep)
    return {name: None if "history" in name else value for name, value in inputs.items()}


def minimax_inputs(batch: int = 1, grid: Grid = RAGGED, timestep: float = 500) -> Inputs:
    """Text, a keyframe, audio, and the video last; the layout is shared by the samples."""
    frames, rows, columns = grid
    text, audio, frame = 6, 4, rows * columns
    places = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1).view(-1, 2)

    def at(times: list[float], places: Tensor) -> Tensor:
        times_of_rows = torch.tensor(times).repeat_interleave(len(places))[:, None]
        return torch.cat([times_of_rows, places.repeat(len(times), 1)], dim=1)

    corner = places[:1]
    position_ids = torch.cat(
        [
            at([float(index) for index in range(text)], corner),
            at([float(text)], places),
            at([text + float(index) for index in range(audio)], corner),
            at([text + 5 / 3 * index for index in range(frames)], places),
        ]
    )
    tags = torch.cat([torch.full((count,), tag) for count, tag in ((text, 1), (frame, 0), (audio, 2))])
    tags = torch.cat([tags, torch.zeros(frames * frame, dtype=torch.long)])
    video = torch.nonzero(tags == 0).flatten()
    return {
        "hidden_states": random(batch, len(video), 16),
        "audio_hidden_states": random(batch, audio, 4),
        "encoder_hidden_states": random(batch, text, 8),
        "timestep": torch.tensor([timestep / 1000, 0.3, 0.0]),
        "timestep_indices": torch.where(tags == 1, 2, torch.where(tags == 2, 1, 0)),
        "token_tags": tags,
        "position_ids": position_ids.double(),
        "video_indices": video,
        "audio_indices": torch.nonzero(tags == 2).flatten(),
        "text_indices": torch.nonzero(tags == 1).flatten(),
    }


_MOTIF = _HEADS | dict(
    in_channels=4,
    out_channels=4,
    num_layers=2,
    num_single_layers=2,
    num_decoder_layers=1,
    patch_size=2,
    patch_size_t=1,
    text_embed_dim=8,
    image_embed_dim=6,
    **_ROPE,
)
_FRAMEPACK = _HEADS | dict(
    in_channels=4,
    out_channels=4,
    num_layers=2,
    num_single_layers=1,
    num_refiner_layers=1,
    text_embed_dim=8,
    pooled_projection_dim=8,
    has_image_proj=True,
    image_proj_dim=6,
    has_clean_x_embedder=True,
    **_ROPE,
)
_HELIOS = _HEADS | dict(
    num_layers=3,
    in_channels=4,
    out_channels=4,
    text_dim=8,
    freq_dim=16,
    ffn_dim=32,
    rope_dim=(4, 6, 6),
)
_MINIMAX = _HEADS | dict(
    hidden_size=24,
    num_layers=3,
    num_refiner_layers=1,
    ffn_dim=32,
    in_channels=4,
    audio_in_channels=4,
    text_dim=8,
    freq_dim=16,
    time_embed_hidden_dim=16,
    time_embed_dim=16,
    rope_freq_dim=2,
)
_DUAL_AND_SINGLE = ("transformer_blocks.*.attn", "single_transformer_blocks.*.attn")

TINY: dict[str, Any] = {
    **family(
        "MotifVideoTransformer3DModel", _MOTIF, motif_inputs, dict.fromkeys(_DUAL_AND_SINGLE, 2), lengths=motif_lengths
    ),
    **family(
        "MotifVideoTransformer3DModel",
        _MOTIF,
        motif_unmasked_inputs,
        dict.fromkeys(_DUAL_AND_SINGLE, 2),
        case=" without padding",
    ),
    **family(
        "HunyuanVideoFramepackTransformer3DModel",
        _FRAMEPACK,
        framepack_inputs,
        dict(zip(_DUAL_AND_SINGLE, (2, 1), strict=True)),
        prefix=HISTORY_TOKENS["framepack"],
        lengths=framepack_lengths,
    ),
    **family(
        "HeliosTransformer3DModel",
        _HELIOS,
        helios_inputs,
        {"blocks.*.attn1": 3},
        prefix=HISTORY_TOKENS["helios"],
    ),
    **family("HeliosTransformer3DModel", _HELIOS, helios_first_chunk, {"blocks.*.attn1": 3}, case=" first chunk"),
    **family(
        "MiniMaxH3Transformer3DModel",
        _MINIMAX,
        minimax_inputs,
        {"transformer_blocks.*.attn": 3},
        prefix=6 + 13 * 17 + 4,
    ),
}
