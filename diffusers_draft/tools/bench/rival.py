"""A rival on the same tensors: Sol-Attn (arXiv 2607.24027) of the package comfy-kitchen, where that is installed."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...attention.layout import TokenLayout, token_layout
from ...attention.select import blocks_of_row
from ...attention.steps import steps_for
from .attention import Row
from .measure import measure
from .reference import Case, relative_error

NAME = "sol_attn (comfy-kitchen)"

TILE = (4, 4, 4)
"""Its blocks are 64 tokens in a row: in this order each is a cube of the video."""

HEAD_DIM = 128
"""The only one that its kernels take."""

TOLERANCE = 0.1
"""Largest relative error with every block computed: it multiplies in INT8, by its authors to a cosine of 0.999."""


def run_rival(case: Case, sparsity: float) -> list[Row]:
    """Time the rival as a whole operator like ours: block order, attention, and the model's order again.

    Its error against dense attention is that of the sparsity; the error against reference rows, that it is used as it
    should be, is measured once more with every block computed.

    Returns:
        One row, with a note instead of a time if anything failed; none where the package is not installed.
    """
    try:
        import comfy_kitchen
    except ImportError:
        return []
    layout = token_layout(case.shape.grid, 0, case.shape.seq_len, TILE, case.tensors[0].device)
    row = Row(NAME, "rival", sparsity, density=_density(layout, sparsity))
    try:
        return [_measured(row, case, comfy_kitchen, layout, sparsity)]
    except Exception as failure:  # whatever a foreign kernel raises, our rows stay
        return [replace(row, note=str(failure).split("\n")[0] or type(failure).__name__)]


def _measured(row: Row, case: Case, package: Any, layout: TokenLayout, sparsity: float) -> Row:
    _check_usable(case, package)
    row = replace(row, error=relative_error(_operator(case, package, layout, 0.0)(), case.dense_blocks))
    if row.error is None or not row.error <= TOLERANCE:
        return replace(row, note="wrong numbers with every block computed, not timed")
    call = _operator(case, package, layout, sparsity)
    row = replace(row, dense_error=relative_error(call(), case.dense_video))
    return replace(row, time=measure(call, case.seconds))


def _check_usable(case: Case, package: Any) -> None:
    """Raise RuntimeError where the package would take its slow reference instead of its kernels."""
    query = case.tensors[0]
    if query.dtype not in (torch.bfloat16, torch.float16) or query.shape[3] != HEAD_DIM:
        raise RuntimeError(f"takes bfloat16 or float16 and heads of {HEAD_DIM}, got {query.dtype}, {query.shape[3]}")
    if not package.sol_attn_is_available(query.device):
        raise RuntimeError(f"its kernels cannot run on this {query.device.type} device")


def _operator(case: Case, package: Any, layout: TokenLayout, sparsity: float) -> Callable[[], Tensor]:
    """Make a call that keeps as many blocks as our row budget and, as ours, all pairs with text."""
    query = case.tensors[0]
    steps = steps_for(query.device, query.dtype, HEAD_DIM, differentiable=False)
    text = [layout.num_video_blocks, layout.num_blocks]
    full = [0, layout.num_blocks]
    ratio = 1 - sparsity if sparsity else 0.0  # it takes no ratio of 1

    def call() -> Tensor:
        query, key, value = (steps.order(tensor, layout, average=False)[0] for tensor in case.tensors)
        out = package.sol_attn(
            query,
            key,
            value,
            scale=case.scale,
            sink_blocks=text,
            sink_q=text if sparsity else full,
            topk_ratio=ratio,
        )
        return steps.restore(out, layout)

    return call


def _density(layout: TokenLayout, sparsity: float) -> float:
    """Compute the share of the pairs that are asked for; a query block's neighbours are computed on top."""
    blocks, video = layout.num_blocks, layout.num_video_blocks
    text = blocks - video
    kept = blocks_of_row(video, sparsity) + text
    return (video * kept + text * blocks) / blocks**2
