"""Locate the video tokens of packed latents, from the coordinates of the tokens."""

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from ..family import Inputs, VideoTokens
from .reading import read_once


def from_arguments(inputs: Inputs, config: Any) -> VideoTokens:
    """Locate the video tokens by the grid among the arguments if it fits, otherwise by the coordinates.

    With the grid of the arguments, the video comes first and all other tokens lie behind it.

    Raises:
        ValueError: if the grid does not fit and there are no coordinates.
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
    return _largest_video(coords)


@read_once
def _largest_video(coords: Tensor) -> VideoTokens:
    """Find the largest video of the first sample, by `(B, 3, S)` coordinates, or `(B, 3, S, 2)` begins and ends."""
    known = coords[0].cpu()
    found = videos(known[..., 0], ends=known[0, :, 1]) if known.dim() == 3 else videos(known)
    return max(found, key=lambda video: math.prod(video.grid))


@read_once
def from_positions(position_ids: Tensor) -> VideoTokens:
    """Locate the last video of a packed sequence by the `(S, 3)` coordinates of its tokens."""
    return videos(position_ids.T.cpu())[-1]


def videos(coords: Tensor, ends: Tensor | None = None) -> list[VideoTokens]:
    """Divide a sequence into videos: runs of frames that cover the same rows and columns at increasing times.

    Conditions in front of a video or behind it break the run of times or cover other rows and columns.

    Args:
        coords: `(3, S)` time, row and column of each token in any unit, on the CPU.
        ends: `(S,)` time at which each token ends. If given, the next frame of a video must begin exactly there, which
            keeps a keyframe behind the video apart.
    """
    time, row, column = coords
    restarts = (row[1:] < row[:-1]) | ((row[1:] == row[:-1]) & (column[1:] <= column[:-1]))
    cuts = torch.nonzero(restarts | (time[1:] != time[:-1])).flatten() + 1
    bounds = [0, *cuts.tolist(), coords.shape[1]]
    found: list[VideoTokens] = []
    before = 0
    for begin, end in itertools.pairwise(bounds):
        follows = time[before] < time[begin] if ends is None else ends[before] == time[begin]
        if follows and coords[1:, begin:end].equal(coords[1:, before:begin]):
            frames, rows, columns = found[-1].grid
            found[-1] = VideoTokens(grid=(frames + 1, rows, columns), prefix=found[-1].prefix)
        else:
            rows = len(row[begin:end].unique())
            found.append(VideoTokens(grid=(1, rows, (end - begin) // rows), prefix=begin))
        before = begin
    return found
