"""Pictures of the demo: videos side by side, and a draft map with the blocks it keeps."""

import io
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, SubFigure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ...attention.call import Call
from ...attention.layout import Grid
from ...config import DraftConfig
from .capture import Captured

QUERY_COLOUR = "#ff2d2d"


def side_by_side(videos: Sequence[np.ndarray], captions: Sequence[str], *, scale: int = 2) -> list[Image.Image]:
    """Put videos side by side, each under its caption.

    Args:
        videos: `(F, H, W, 3)` uint8, all of one shape.
        captions: one for each video.
        scale: factor on height and width.

    Returns:
        One RGB image for each frame, as wide as the videos together and 24 pixels higher.
    """
    height, width = (scale * size for size in videos[0].shape[1:3])
    font = ImageFont.load_default(14)
    pairs = []
    for frames in zip(*videos, strict=True):
        pair = Image.new("RGB", (width * len(videos), height + 24), "white")
        draw = ImageDraw.Draw(pair)
        for column, (frame, caption) in enumerate(zip(frames, captions, strict=True)):
            draw.text((column * width + 6, 3), caption, fill="black", font=font)
            picture = Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC)
            pair.paste(picture, (column * width, 24))
        pairs.append(pair)
    return pairs


def draft_picture(
    tensors: Captured, grid: Grid, video: np.ndarray, config: DraftConfig, *, head: int = 0, block: int | None = None
) -> Image.Image:
    """Draw the kept blocks of one head: for one query block over the video, for all blocks beside the draft map.

    Args:
        tensors: tensors of one layer with video tokens alone.
        grid: `(T, Y, X)` tokens of the video.
        video: `(F, H, W, 3)` uint8, which the blocks are drawn on.
        config: sparsity, tile and budget.
        head: index of the head.
        block: index of the query block; by default one in the middle of the video.

    Returns:
        An RGB image.
    """
    query, key, value = (
        tensor[:1, :, head : head + 1]
        for tensor in (tensors.query, tensors.key, tensors.value)
        if tensor is not None  # the layer has run
    )
    call = Call.order(query, key, value, torch.tensor([*grid, 0]), None, config.method)
    layout, draft = call.layout, call.draft()
    video_blocks = layout.num_video_blocks
    kept = call.select(config.known_sparsity).to_dense()[0, 0].cpu()
    labels = (layout.inverse // layout.block).cpu().view(grid)
    if block is None:
        block = int(labels[grid[0] // 2, grid[1] // 2, grid[2] // 2])
        block = min(block, video_blocks - 1)

    figure = Figure(figsize=(10, 6.6), layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(1, 1.9)).flat
    _draw_frames(above, labels, video, kept[block], block)
    left, right = below.subplots(1, 2)
    pairs = kept[:video_blocks, :video_blocks]
    _draw_map(left, draft[0, 0].cpu(), f"Draft map of head {head}: {video_blocks} x {video_blocks} video blocks")
    right.imshow(pairs.numpy(), cmap="Greys", vmin=0, vmax=1)
    right.set_title(f"Kept: {pairs.float().mean().item():.1%} of the pairs", fontsize="medium")
    for axes in (left, right):
        axes.axhline(block, color=QUERY_COLOUR, linewidth=0.8)
        axes.set_xlabel("key block")
        axes.set_ylabel("query block")
    file = io.BytesIO()
    figure.savefig(file, dpi=100)
    return Image.open(file).convert("RGB")


def _draw_frames(figure: SubFigure, labels: Tensor, video: np.ndarray, kept: Tensor, block: int) -> None:
    """Draw three latent frames around the query block with the borders of blocks; kept blocks stay bright."""
    frames = len(labels)
    middle = int((labels == block).flatten(1).sum(1).argmax())
    shown = sorted({min(max(middle + step, 0), frames - 1) for step in (-1, 0, 1)})
    here = int(kept[labels[shown].unique()].sum())
    figure.suptitle(
        f"Query block {block} (red) and the key blocks it keeps (bright): {int(kept.sum())} of {len(kept)}, "
        f"{here} of them in these frames",
        fontsize="medium",
    )
    for axes, frame in zip(figure.subplots(1, len(shown), squeeze=False).flat, shown, strict=True):
        step = (len(video) - 1) / max(frames - 1, 1)
        picture = torch.from_numpy(video[round(frame * step)]) / 255
        rows, columns = labels.shape[1:]
        bright = kept[labels[frame]].repeat_interleave(len(picture) // rows, 0)
        bright = bright.repeat_interleave(picture.shape[1] // columns, 1)
        picture = torch.where(bright[..., None], picture, 0.4 * picture.mean(-1, keepdim=True))
        axes.imshow(picture.numpy(), extent=(0, columns, rows, 0))
        axes.add_collection(LineCollection(_borders(labels[frame]), colors="#888888", linewidths=0.6))
        own = LineCollection(_borders(labels[frame] == block), colors=QUERY_COLOUR, linewidths=2.5)
        axes.add_collection(own)
        axes.set_title(f"latent frame {frame}", fontsize="medium")
        axes.set_axis_off()


def _borders(labels: Tensor) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """List the line segments, in (x, y), between neighbours of different labels `(Y, X)`."""
    beside = (labels[:, 1:] != labels[:, :-1]).nonzero().tolist()
    below = (labels[1:] != labels[:-1]).nonzero().tolist()
    upright = [((x + 1, y), (x + 1, y + 1)) for y, x in beside]
    return upright + [((x, y + 1), (x + 1, y + 1)) for y, x in below]


def _draw_map(axes: Axes, draft: Tensor, title: str) -> None:
    """Draw a draft map on a logarithmic scale."""
    shown = axes.imshow(draft.numpy(), norm=LogNorm(vmin=max(float(draft.max()) * 1e-3, 1e-12)), cmap="viridis")
    axes.figure.colorbar(shown, ax=axes, shrink=0.8)
    axes.set_title(title, fontsize="medium")
