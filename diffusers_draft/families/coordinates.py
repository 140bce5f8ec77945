"""Grids of packed latents, read from the coordinates of their tokens."""

import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import Inputs, VideoTokens

_found: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""What was read already: reading waits for the GPU, and most pipelines keep their coordinates for a whole run."""


def from_arguments(inputs: Inputs, config: Any) -> VideoTokens:
    """The grid that the arguments of the forward give, where they give one, or else its coordinates.

    Tokens that do not belong to the grid of the arguments lie behind it.
    """
    seq_len = inputs["hidden_states"].shape[1]
    frames, rows, columns = (inputs.get(name) or 0 for name in ("num_frames", "height", "width"))
    coords = inputs.get("video_coords")
    given = frames * rows * columns
    if given == seq_len or 1 < given < seq_len:  # LTXI2VLongMultiPromptPipeline gives (1, 1, 1)
        return VideoTokens(grid=(frames, rows, columns))
    if coords is None:
        raise ValueError(
            f"num_frames={frames}, height={rows} and width={columns} do not fit the {seq_len} tokens of "
            "hidden_states. Draft attention needs the latent grid of the video: pass it, or video_coords."
        )
    if coords not in _found:
        starts = coords[0, ..., 0] if coords.dim() == 4 else coords[0]
        _found[coords] = max(videos(starts.cpu()), key=lambda video: math.prod(video.grid))
    return _found[coords]


def from_positions(position_ids: Tensor) -> VideoTokens:
    """The last video of a packed sequence, from the `(S, 3)` coordinates of its tokens."""
    if position_ids not in _found:
        _found[position_ids] = videos(position_ids.T.cpu())[-1]
    return _found[position_ids]


def videos(coords: Tensor) -> list[VideoTokens]:
    """Cuts a sequence into runs of frames in raster order that cover the same places at increasing times.

    Conditions in front of a video or behind it begin at another time or cover other places.

    Args:
        coords: `(3, S)` time, row and column of each token in any unit, on the CPU.
    """
    time, row, column = coords
    restarts = (row[1:] < row[:-1]) | ((row[1:] == row[:-1]) & (column[1:] <= column[:-1]))
    cuts = torch.nonzero(restarts | (time[1:] != time[:-1])).flatten() + 1
    bounds = [0, *cuts.tolist(), coords.shape[1]]
    found: list[VideoTokens] = []
    before = 0
    for begin, end in itertools.pairwise(bounds):
        if coords[1:, begin:end].equal(coords[1:, before:begin]) and time[before] < time[begin]:
            frames, rows, columns = found[-1].grid
            found[-1] = VideoTokens(grid=(frames + 1, rows, columns), prefix=found[-1].prefix)
        else:
            rows = len(row[begin:end].unique())
            found.append(VideoTokens(grid=(1, rows, (end - begin) // rows), prefix=begin))
        before = begin
    return found
