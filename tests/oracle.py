"""Draft attention from its definition: raster order, float64, plain loops, no code of the package."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Grid = tuple[int, int, int]
Pairs = set[tuple[int, int]]


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """Softmax attention of `(B, S, H, D)` tensors under a `(B, H, S, S)` bool mask, in float64."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query, key, value = (tensor.double().transpose(1, 2) for tensor in (query, key, value))
    scores = (query @ key.transpose(-1, -2)) * scale
    return (torch.softmax(scores.masked_fill(~mask, -torch.inf), dim=-1) @ value).transpose(1, 2)


def length_mask(batch: int, heads: int, seq_len: int, lengths: Tensor | None) -> Tensor:
    """`(B, H, S, S)` bool: dense attention to the leading `lengths` keys of each sample."""
    mask = torch.ones(batch, heads, seq_len, seq_len, dtype=torch.bool)
    if lengths is not None:
        for sample, length in enumerate(lengths.tolist()):
            mask[sample, :, :, length:] = False
    return mask


def error(found: Tensor, expected: Tensor) -> float:
    """Relative error by norm."""
    return ((found.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def strips(rows: int, height: int) -> list[list[int]]:
    """The rows of each strip: `round(rows / height)` strips of nearly equal height."""
    count = max(1, round(rows / height))
    members = [[] for _ in range(count)]
    for row in range(rows):
        members[((row + 1) * count - 1) // rows].append(row)
    return members


def walk(grid: Grid, tile: tuple[int, ...]) -> list[int]:
    """Raster positions in walking order: column by column, strips back and forth, odd slabs of frames reversed."""
    frames, rows, columns = grid
    visited = []
    for slab_number, slab in enumerate(strips(frames, tile[0] if len(tile) == 3 else 1)):
        path = []
        for number, strip in enumerate(strips(rows, tile[-2])):
            order = range(columns) if number % 2 == 0 else reversed(range(columns))
            path += [(f * rows + row) * columns + column for column in order for f in slab for row in strip]
        visited += path if slab_number % 2 == 0 else path[::-1]
    return visited


def block_order(grid: Grid, prefix: int, seq_len: int, tile: tuple[int, ...]) -> Tensor:
    """`(S,)` original position of each token when the video is walked first and all other tokens come behind."""
    video = walk(grid, tile)
    others = [*range(prefix), *range(prefix + len(video), seq_len)]
    return torch.tensor([prefix + position for position in video] + others, dtype=torch.int64)


def listed(mask) -> list[list[list[list[int]]]]:
    """The key blocks that a `BlockMask` lists, by sample, head and query block."""
    counts, indices = mask.kv_num_blocks.tolist(), mask.kv_indices.tolist()
    return [
        [[indices[sample][head][row][:count] for row, count in enumerate(rows)] for head, rows in enumerate(heads)]
        for sample, heads in enumerate(counts)
    ]


def token_mask(mask, order: Tensor) -> Tensor:
    """`(B, H, S, S)` bool in raster order: the tokens that a `BlockMask` in block order lets each token attend to."""
    batch, heads, num_blocks = mask.kv_num_blocks.shape
    tokens = [order[start : start + mask.block] for start in range(0, mask.seq_len, mask.block)]
    assert len(tokens) == num_blocks
    raster = torch.zeros(batch, heads, mask.seq_len, mask.seq_len, dtype=torch.bool)
    for sample, sample_rows in enumerate(listed(mask)):
        for head, rows in enumerate(sample_rows):
            for queries, kept in zip(tokens, rows, strict=True):
                keys = torch.cat([tokens[block] for block in kept])
                raster[sample, head, queries[:, None], keys] = True
        if mask.kv_len is not None:
            raster[sample, :, :, int(mask.kv_len[sample]) :] = False
    return raster


def block_means(tokens: Tensor, order: Tensor, num_blocks: int, block: int) -> Tensor:
    """`(B, H, num_blocks, D)` float64 mean of each of the leading blocks of raster-ordered `(B, S, H, D)` tokens."""
    batch, _, heads, head_dim = tokens.shape
    means = torch.zeros(batch, heads, num_blocks, head_dim, dtype=torch.float64)
    for index in range(num_blocks):
        means[:, :, index] = tokens.double()[:, order[index * block : (index + 1) * block]].mean(dim=1)
    return means


def draft_map(query: Tensor, key: Tensor, order: Tensor, num_blocks: int, block: int, scale: float) -> Tensor:
    """`(B, H, Nv, Nv)` float64 softmax attention between block means."""
    query, key = (block_means(tensor, order, num_blocks, block) for tensor in (query, key))
    draft = torch.zeros(*query.shape[:3], num_blocks, dtype=torch.float64)
    for row in range(num_blocks):
        scores = (query[:, :, row : row + 1] * key).sum(-1) * scale
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        draft[:, :, row] = weights / weights.sum(-1, keepdim=True)
    return draft


def number_of_pairs(num_blocks: int, sparsity: float, budget: str) -> int:
    """How many video pairs are kept in each head."""
    if budget == "head":
        return max(num_blocks, round((1 - sparsity) * num_blocks * num_blocks))
    return num_blocks * max(1, round((1 - sparsity) * num_blocks))


def best_pairs(scores: Tensor, sparsity: float, budget: str) -> Pairs:
    """The (query block, key block) pairs to keep of one head's `(Nv, Nv)` map: every own block, then the largest."""
    num_blocks = len(scores)
    count = number_of_pairs(num_blocks, sparsity, budget)
    pairs = [(row, column) for row in range(num_blocks) for column in range(num_blocks)]
    pairs.sort(key=lambda pair: (pair[0] == pair[1], float(scores[pair])), reverse=True)
    if budget == "head":
        return set(pairs[:count])
    rows = [[pair for pair in pairs if pair[0] == row] for row in range(num_blocks)]
    return {pair for row in rows for pair in row[: count // num_blocks]}


def value_scores(draft: Tensor, value: Tensor, order: Tensor, block: int) -> Tensor:
    """`(B, H, Nv, Nv)` float64: the draft's mass times how far a block's mean value lies from the row's output."""
    num_blocks = draft.shape[-1]
    means = block_means(value, order, num_blocks, block)
    scores = torch.zeros_like(draft)
    for row in range(num_blocks):
        output = sum(draft[:, :, row, column, None] * means[:, :, column] for column in range(num_blocks))
        for column in range(num_blocks):
            distance = (means[:, :, column] - output).square().sum(-1).sqrt()
            scores[:, :, row, column] = draft[:, :, row, column] * distance
    return scores


RIDGE, LEAST = 0.1, 1e-6


@dataclass(frozen=True)
class Fit:
    """The correction of one head: a row `o` becomes `o + (o - mean) @ matrix + shift`, if that `helps`.

    Attributes:
        mean: `(D,)` of the probes' sparse output.
        matrix: `(D, D)`.
        shift: `(D,)`, mean of what the sparse output lacks.
        before: sum of the probes' squared errors.
        after: as `before`, each as it is when the probe is left out of the fit.
        whole: sum of the probes' squared exact output.
        regression: `(D, D)`, the matrix of the regression, also where it is not used.
        candidates: what `after` was chosen from: the regression's, its shift's alone, and nothing's.
    """

    mean: Tensor
    matrix: Tensor
    shift: Tensor
    before: float
    after: float
    whole: float
    candidates: tuple[float, ...] = ()
    regression: Tensor | None = None

    @property
    def helps(self) -> bool:
        return math.isfinite(self.after) and self.after < self.before

    @property
    def is_close_call(self) -> bool:
        """Whether rounding to float32 may decide; also where there is nothing but rounding to correct."""
        best, second, *_ = sorted(value for value in (*self.candidates, math.inf) if not math.isnan(value))
        return second - best <= 1e-3 * self.before or self.before <= 1e-10 * self.whole

    def apply(self, rows: Tensor) -> Tensor:
        return rows + (rows - self.mean) @ self.matrix + self.shift if self.helps else rows


def fit(sparse: Tensor, exact: Tensor) -> Fit:
    """Fit one head's correction in its primal form from `(n, D)` float64 outputs of the probes."""
    n, dim = sparse.shape
    residual = exact - sparse
    mean, shift = sparse.mean(0), residual.mean(0)
    covariance, cross = torch.zeros(dim, dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64)
    for row in range(n):
        covariance += torch.outer(sparse[row] - mean, sparse[row] - mean) / n
        cross += torch.outer(sparse[row] - mean, residual[row] - shift) / n
    variance = covariance.diagonal()
    penalty = torch.diag(RIDGE * variance + LEAST * variance.mean())
    before, whole = residual.square().sum().item(), exact.square().sum().item()
    try:
        inverse = torch.linalg.inv(covariance + penalty)
    except torch.linalg.LinAlgError:
        return Fit(mean, torch.zeros_like(cross), shift, before, math.nan, whole, (math.nan, math.nan, before))
    matrix = inverse @ cross
    after = 0.0
    for row in range(n):
        centred = sparse[row] - mean
        leverage = (centred @ inverse @ centred).item() / n + 1 / n
        left = residual[row] - shift - centred @ matrix
        after += left.square().sum().item() / (1 - leverage) ** 2 if leverage != 1 else math.nan
    by_shift = 0.0
    for row in range(n):
        others = torch.cat([residual[:row], residual[row + 1 :]])
        by_shift += (residual[row] - others.mean(0)).square().sum().item() if n > 1 else math.inf
    candidates = (after, by_shift, before)
    regression = matrix
    if not after < min(by_shift, before):
        matrix, after = torch.zeros_like(matrix), by_shift
    return Fit(mean, matrix, shift, before, after, whole, candidates, regression)


def correction(sparse: Tensor, exact: Tensor) -> list[list[Fit]]:
    """The `Fit` of each sample and head from `(B, n, H, D)` outputs of the probes."""
    batch, _, heads, _ = sparse.shape
    sparse, exact = sparse.double(), exact.double()
    return [[fit(sparse[b, :, h], exact[b, :, h]) for h in range(heads)] for b in range(batch)]


def corrected_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask,
    order: Tensor,
    rows: Tensor,
    scale: float | None = None,
) -> tuple[Tensor, list[list[Fit]]]:
    """Draft attention in raster order under a `BlockMask` in block order, and how each head was corrected.

    Args:
        query: `(B, S, H, D)` in raster order.
        key: as `query`; what lies behind the valid keys is never looked at.
        value: as `key`.
        mask: which blocks are kept.
        order: from `block_order`.
        rows: `(n,)` positions in block order of the probes.
        scale: factor on the scores.
    """
    batch, seq_len, heads, _ = query.shape
    key, value = key.double(), value.double()
    if mask.kv_len is not None:
        behind = torch.arange(seq_len) >= mask.kv_len.cpu()[:, None]
        key, value = (tensor.masked_fill(behind[:, :, None, None], 0) for tensor in (key, value))
    out = attention(query, key, value, token_mask(mask, order), scale)
    if not len(rows):
        return out, []
    exact = attention(query, key, value, length_mask(batch, heads, seq_len, mask.kv_len), scale)
    probes, video = order[rows], order[: mask.num_video_blocks * mask.block]
    fits = correction(out[:, probes], exact[:, probes])
    for sample, of_heads in enumerate(fits):
        for head, found in enumerate(of_heads):
            out[sample, video, head] = found.apply(out[sample, video, head])
    return out, fits
