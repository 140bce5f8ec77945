"""Draft attention as a function of tensors, for any model."""

import torch
from torch import Tensor

from .layout import Grid, Tile
from .method import Budget, Method, Score, check_grid, check_scale, check_sparsity
from .ops import attend


def draft_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: Grid,
    *,
    sparsity: float = 0.8,
    prefix: int = 0,
    kv_len: Tensor | None = None,
    tile: Tile = Method.tile,
    budget: Budget = Method.budget,
    score: Score = Method.score,
    probes: int = Method.probes,
    backend: str = Method.backend,
    scale: float | None = None,
) -> Tensor:
    """Attend sparsely over video tokens, guided by a low-resolution draft of the attention itself.

    Block-sparse self-attention of DraftAttention (arXiv 2505.14708), corrected by a regression on a few exact rows.
    With `probes=0` it equals dense attention under the selected block mask; at `sparsity=0` it equals dense attention.

    Args:
        query: `(B, S, H, D)` float32, float16, bfloat16, or float64, which the backends `torch` and `reference` take.
        key: as `query`.
        value: as `query`.
        grid: `(T, Y, X)` frames, rows and columns of the video tokens, which lie in raster order.
        sparsity: share of the video block pairs to skip, in [0, 1).
        prefix: position of the first video token. Tokens before and behind the video (text, audio, references)
            are always attended to, and attend to everything.
        kv_len: `(B,)` integers on any device: how many leading tokens of each sample are valid keys, at least
            `prefix + T * Y * X` (right-padded text). None if all are. Tokens behind it are never attended to.
        tile: `(h, w)` or `(t, h, w)` tokens of a block, see `DraftConfig`.
        budget: `"row"` or `"head"`, see `DraftConfig`.
        score: `"value"` or `"mass"`, see `DraftConfig`.
        probes: rows of each head that are computed exactly to correct the others, see `DraftConfig`.
        backend: `"auto"` or a name from `diffusers_draft.attention.kernels.BACKENDS`.
        scale: factor on the scores, `D ** -0.5` by default.

    Returns:
        `(B, S, H, D)`, contiguous, in the original token order.

    Raises:
        ValueError: for options out of range, and for tensors whose shapes do not fit each other or the grid.
        ImportError: if the package of the chosen backend is missing.
        RuntimeError: if the chosen backend cannot run on these tensors, or has no backward and they need one.
    """
    _check_are_tensors(query, key, value)
    method = Method(tile=tile, budget=budget, score=score, probes=probes, backend=backend)
    check_sparsity(sparsity)
    check_grid(grid, prefix)
    check_scale(scale)
    geometry = torch.tensor([*grid, prefix], dtype=torch.int64, device="cpu")
    numbers = torch.tensor([sparsity, 0], dtype=torch.float64, device="cpu")
    return attend(
        query, key, value, geometry, kv_len, numbers, method.to_tensor(), None if scale is None else float(scale)
    ).out


def _check_are_tensors(*arguments: object) -> None:
    for argument in arguments:
        if not isinstance(argument, Tensor):
            raise ValueError(
                f"query, key and value must be torch tensors, got {type(argument).__name__}. torch.as_tensor makes "
                "one of an array."
            )
