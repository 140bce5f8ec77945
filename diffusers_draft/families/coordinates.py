"""Grids of packed latents, read from the coordinates of their tokens."""

import math

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import Inputs, VideoTokens

_found: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""What was read already: reading waits for the GPU, and most pipelines keep their coordinates for a whole run."""


def from_arguments(inputs: Inputs) -> VideoTokens:
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
        _found[coords] = longest_video(starts.cpu())
    return _found[coords]


def longest_video(coords: Tensor) -> VideoTokens:
    """The longest run of frames in raster order that cover the same places at increasing times.

    Conditions in front of a video or behind it begin at another time or cover other places.

    Args:
        coords: `(3, S)` time, row and column of each token in any unit, on the CPU.
    """
    time, row, column = coords
    restarts = (row[1:] < row[:-1]) | ((row[1:] == row[:-1]) & (column[1:] <= column[:-1]))
    cuts = torch.nonzero(restarts | (time[1:] != time[:-1])).flatten() + 1
    bounds = [0, *cuts.tolist(), coords.shape[1]]
    best = VideoTokens(grid=(0, 0, 0))
    first = 0
    for frame in range(len(bounds) - 1):
        begin, end = bounds[frame : frame + 2]
        before = bounds[max(frame - 1, 0)]
        continues = coords[1:, begin:end].equal(coords[1:, before:begin]) and time[before] < time[begin]
        first = first if continues else frame
        rows = len(row[begin:end].unique())
        grid = (frame - first + 1, rows, (end - begin) // rows)
        if math.prod(grid) > math.prod(best.grid):
            best = VideoTokens(grid=grid, prefix=bounds[first])
    return best
