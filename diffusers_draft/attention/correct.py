"""The correction: a few exact rows show what the kept blocks leave out, and a regression carries it to all others.

The sparse output `x` and the exact output `y` of the same rows, the *probes*, are fitted by ridge regression,
`y - x ~ (x - mean) L + b`, for every sample and head. Neighbours: SparsePR (arXiv 2608.18484) fits such a residual,
Delta attention (arXiv 2505.11254) repeats raw differences.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 0.1
"""Weight of the penalty, relative to the variance of each dimension."""
LEAST = 1e-6
"""Penalty of dimensions without variance, relative to the mean variance."""


@dataclass(frozen=True)
class Correction:
    """An affine map of each head's output, `o + o @ matrix + offset`.

    Attributes:
        matrix: `(B, H, D, D)` float32, or float64 as the output; zero where a head is left alone.
        offset: `(B, H, D)`, likewise.
        squares: `(3,)` float32, sums over the probes of all samples and heads: the squared error of the sparse output,
            of the corrected one as measured by leaving each probe out of its own fit, and the squared exact output.
    """

    matrix: Tensor
    offset: Tensor
    squares: Tensor


@functools.lru_cache(maxsize=32)
def probe_rows(rows: int, probes: int, number: int, device: torch.device) -> Tensor:
    """Choose one row in each of `probes` equal stretches of `rows`: `(min(probes, rows),)` int64, ascending.

    Args:
        rows: of video blocks, in block order.
        probes: how many, if there are as many rows.
        number: shifts the place in a stretch; steps with other numbers see other rows.
        device: of the result.
    """
    probes = min(probes, rows)
    shift = (number * 0x9E3779B9 + 0x80000000) % (1 << 32)  # multiples of the golden ratio are spread evenly
    with torch.inference_mode(False):
        bounds = torch.arange(probes + 1, device=device) * rows // max(probes, 1)
        return bounds[:-1] + ((bounds[1:] - bounds[:-1]) * shift >> 32)


@torch.no_grad()
def fit(sparse: Tensor, exact: Tensor) -> Correction:
    """Fit the correction from the probes. Nothing waits for the device.

    The regression is solved in its dual form, with a system as large as the number of probes. With `A` its inverse
    times their number, residuals are `A r` and `1 - h` is `diag A - 1/n`, `h` being the leverages with the mean's in
    them: the error with a probe left out, `(A r) / (1 - h)`, needs no second fit. By that error each head takes the
    best of the regression, its shift `b` alone, and nothing: a regression that only found the shift would carry noise
    to rows that lie far from the probes.

    Args:
        sparse: `(B, n, H, D)`, the sparse output of the probes.
        exact: as `sparse`, their exact output.
    """
    dtype = torch.promote_types(sparse.dtype, torch.float32)
    x, y = (tensor.transpose(1, 2).to(dtype) for tensor in (sparse, exact))
    probes = x.shape[2]
    residual = y - x
    mean, shift = x.mean(2, keepdim=True), residual.mean(2, keepdim=True)
    centred, left = x - mean, residual - shift
    variance = centred.square().mean(2, keepdim=True)
    penalty = RIDGE * variance + LEAST * variance.mean(3, keepdim=True)
    weighted = centred / penalty
    eye = torch.eye(probes, dtype=dtype, device=x.device)
    inverse = torch.linalg.inv_ex(weighted @ centred.mT / probes + eye, check_errors=False).inverse
    fitted = inverse @ left
    matrix = weighted.mT @ fitted / probes
    leave_one_out = fitted / (inverse.diagonal(dim1=-2, dim2=-1) - 1 / probes)[..., None]

    before, by_fit = residual.square().sum((2, 3)), leave_one_out.square().sum((2, 3))
    others = probes / (probes - 1) if probes > 1 else torch.inf  # a single probe tells nothing of others
    by_shift = left.square().sum((2, 3)) * others**2
    fits = by_fit < torch.minimum(before, by_shift)  # comparisons with NaN are False
    shifts = ~fits & (by_shift < before)
    matrix = torch.where(fits[..., None, None], matrix, 0)
    offset = torch.where((fits | shifts)[..., None, None], shift - mean @ matrix, 0)[:, :, 0]
    after = torch.where(fits, by_fit, torch.where(shifts, by_shift, before))
    squares = torch.stack([before.sum(), after.sum(), y.square().sum()]).float()
    return Correction(matrix, offset, squares)
