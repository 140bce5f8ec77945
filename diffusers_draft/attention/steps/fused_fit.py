"""Triton: the correction, from the exact rows' attention to the parts of the keys, by one program for each head."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..correct import LEAST, RIDGE, Correction, fit
from .fused_exact import exact_parts, merged

MOST_PROBES = 64
"""Probes whose system still fits the registers of one program."""


def correct(
    out: Tensor, rows: Tensor, query: Tensor, key: Tensor, value: Tensor, kv_len: Tensor | None, scale: float
) -> Correction:
    """Attend exactly with some rows, and fit the correction to them."""
    parts, lse = exact_parts(query[:, rows], key, value, kv_len, scale)
    if len(rows) > MOST_PROBES or not _fits(out.device):
        return fit(out[:, rows], merged(parts, lse))
    return fit_parts(out, rows, parts, lse)


def _fits(device: torch.device) -> bool:
    """Return True if the device has the 128 KB of shared memory that a program needs; GPUs for desktops have less."""
    if device.type != "cuda":
        return True  # interpreted
    capability = torch.cuda.get_device_capability(device)
    return torch.version.hip is None and (capability == (8, 0) or capability[0] in (9, 10))


def fit_parts(out: Tensor, rows: Tensor, parts: Tensor, lse: Tensor) -> Correction:
    """Merge the exact output and fit the correction as `correct.fit` does.

    Args:
        out: `(B, S, H, D)` sparse output, last stride 1.
        rows: `(n,)` int64, those of the probes; at most `MOST_PROBES`.
        parts: `(P, B, H, n, D)` float32, exact output over each part of the keys.
        lse: `(P, B, H, n)` float32, log-sum-exp of the scores in each part; -inf where it has no valid keys.
    """
    splits, batch, heads, probes, head_dim = parts.shape
    matrix = torch.empty(batch, heads, head_dim, head_dim, dtype=torch.float32, device=out.device)
    offset = torch.empty(batch, heads, head_dim, dtype=torch.float32, device=out.device)
    squares = torch.empty(batch, heads, 3, dtype=torch.float32, device=out.device)
    _fit_kernel[(heads, batch)](
        out, rows, parts, lse, matrix, offset, squares, *out.stride()[:3], heads, batch * heads * probes,
        SPLITS=splits, PROBES=probes, PADDED=max(16, triton.next_power_of_2(probes)), HEAD_DIM=head_dim,
        PADDED_DIM=max(16, triton.next_power_of_2(head_dim)), RIDGE=RIDGE, LEAST=LEAST, num_warps=8,
    )  # fmt: skip
    return Correction(matrix, offset, squares.sum((0, 1)))


@triton.jit
def _fit_kernel(
    out_ptr, rows_ptr, parts_ptr, lse_ptr, matrix_ptr, offset_ptr, squares_ptr,
    stride_b, stride_s, stride_h, heads, all_rows,
    SPLITS: tl.constexpr, PROBES: tl.constexpr, PADDED: tl.constexpr, HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, RIDGE: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    sample = tl.program_id(1).to(tl.int64)
    number = sample * heads + head
    probe = tl.arange(0, PADDED)
    dims = tl.arange(0, PADDED_DIM)
    probed = (probe < PROBES)[:, None] & (dims < HEAD_DIM)[None, :]

    y = _merged(parts_ptr, lse_ptr, number * PROBES + probe, all_rows, probe, dims, SPLITS, PROBES, HEAD_DIM)
    row = tl.load(rows_ptr + probe, mask=probe < PROBES, other=0)
    source = out_ptr + sample * stride_b + head * stride_h + row[:, None] * stride_s + dims[None, :]
    x = tl.load(source, mask=probed, other=0.0).to(tl.float32)
    residual = y - x
    mean, shift = tl.sum(x, 0) / PROBES, tl.sum(residual, 0) / PROBES
    centred = tl.where(probed, x - mean[None, :], 0.0)
    left = tl.where(probed, residual - shift[None, :], 0.0)
    variance = tl.sum(centred * centred, 0) / PROBES
    penalty = RIDGE * variance + LEAST * tl.sum(variance, 0) / HEAD_DIM
    weighted = tl.where(probed, centred / penalty[None, :], 0.0)
    system = tl.dot(weighted, centred.T, input_precision="tf32x3") / PROBES
    inverse = _inverse(system + (probe[:, None] == probe[None, :]).to(tl.float32), PADDED)
    fitted = tl.dot(inverse, left, input_precision="tf32x3")
    matrix = tl.dot(weighted.T, fitted, input_precision="tf32x3") / PROBES
    diagonal = tl.sum(tl.where(probe[:, None] == probe[None, :], inverse, 0.0), 1)
    leave_one_out = tl.where(probed, fitted / (diagonal - 1 / PROBES)[:, None], 0.0)

    before = tl.sum(tl.sum(residual * residual, 1), 0)
    by_fit = tl.sum(tl.sum(leave_one_out * leave_one_out, 1), 0)
    if PROBES > 1:
        by_shift = tl.sum(tl.sum(left * left, 1), 0) * (PROBES / (PROBES - 1)) * (PROBES / (PROBES - 1))
    else:
        by_shift = before * float("inf")  # a single probe tells nothing of others
    fits = (by_fit < before) & (by_fit < by_shift)  # comparisons with NaN are False
    shifts = (by_shift < before) & (fits == 0)
    matrix = tl.where(fits, matrix, 0.0)
    offset = shift - tl.sum(mean[:, None] * matrix, 0)
    offset = tl.where(fits | shifts, offset, 0.0)
    after = tl.where(fits, by_fit, tl.where(shifts, by_shift, before))

    inside = (dims < HEAD_DIM)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(matrix_ptr + (number * HEAD_DIM + dims[:, None]) * HEAD_DIM + dims[None, :], matrix, mask=inside)
    tl.store(offset_ptr + number * HEAD_DIM + dims, offset, mask=dims < HEAD_DIM)
    tl.store(squares_ptr + number * 3, before)
    tl.store(squares_ptr + number * 3 + 1, after)
    tl.store(squares_ptr + number * 3 + 2, tl.sum(tl.sum(y * y, 1), 0))


@triton.jit
def _merged(
    parts_ptr, lse_ptr, at, all_rows, probe, dims,
    SPLITS: tl.constexpr, PROBES: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Merge the parts by their log-sum-exp."""
    peak = tl.full(probe.shape, float("-inf"), tl.float32)
    for split in range(SPLITS):
        peak = tl.maximum(peak, tl.load(lse_ptr + split * all_rows + at, mask=probe < PROBES, other=0.0))
    total = tl.zeros(probe.shape, tl.float32)
    merged = tl.zeros([probe.shape[0], dims.shape[0]], tl.float32)
    for split in range(SPLITS):
        part = split * all_rows + at
        weight = tl.exp(tl.load(lse_ptr + part, mask=probe < PROBES, other=0.0) - peak)
        mask = (probe < PROBES)[:, None] & (dims < HEAD_DIM)[None, :]
        merged += weight[:, None] * tl.load(parts_ptr + part[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
        total += weight
    return merged / total[:, None]


@triton.jit
def _inverse(system, SIZE: tl.constexpr):
    """Invert a positive definite matrix by Gauss-Jordan elimination, which needs no pivoting for it."""
    row = tl.arange(0, SIZE)[:, None]
    column = tl.arange(0, SIZE)[None, :]
    for k in range(SIZE):
        of_row = tl.sum(tl.where(row == k, system, 0.0), 0)
        of_column = tl.sum(tl.where(column == k, system, 0.0), 1)
        pivot = 1 / tl.sum(tl.where(tl.arange(0, SIZE) == k, of_row, 0.0), 0)
        other = system - of_column[:, None] * of_row[None, :] * pivot
        other = tl.where(column == k, -of_column[:, None] * pivot, other)
        system = tl.where(row == k, tl.where(column == k, pivot, of_row[None, :] * pivot), other)
    return system
