"""Draft attention: order, draft, select, attend, restore."""

import importlib
import math
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from ..config import Budget, DraftConfig, check_grid
from . import kernels
from .layout import Grid, Tile, token_layout
from .steps import plain


def draft_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: Grid,
    *,
    sparsity: float = 0.9,
    prefix: int = 0,
    kv_len: Tensor | None = None,
    tile: Tile = DraftConfig.tile,
    budget: Budget = DraftConfig.budget,
    backend: str = "auto",
    scale: float | None = None,
) -> Tensor:
    """Block-sparse self-attention over video tokens, guided by a low-resolution draft of itself (arXiv 2505.14708).

    Equals dense attention under the selected block mask; at `sparsity=0` it equals dense attention.

    Args:
        query: `(B, S, H, D)` float32, float16 or bfloat16.
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
        backend: `"auto"` or a name from `diffusers_draft.attention.kernels.BACKENDS`.
        scale: factor on the scores, `D ** -0.5` by default.

    Returns:
        `(B, S, H, D)`, contiguous, in the original token order.

    Raises:
        ValueError: for options out of range, and for tensors whose shapes do not fit each other or the grid.
        ImportError: if the package of the chosen backend is missing.
        RuntimeError: if the chosen backend cannot run on these tensors, or has no backward and they need one.
    """
    config = DraftConfig(sparsity=sparsity, tile=tile, budget=budget, backend=backend)
    check_grid(grid, prefix)
    geometry = torch.tensor([*grid, prefix])
    return attend(query, key, value, geometry, kv_len, config, scale)[0]


def check_backend(name: str) -> None:
    """Raises ImportError if the package of a backend that was asked for by name is missing."""
    if name != "auto":
        kernels.load(name)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    geometry: Tensor,
    kv_len: Tensor | None,
    config: DraftConfig,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Draft attention for callers under `torch.compile`: nothing here depends on the numbers in `geometry`.

    Args:
        query: `(B, S, H, D)`.
        key: as `query`.
        value: as `query`.
        geometry: `(4,)` int64 on the CPU: T, Y, X and the prefix.
        kv_len: `(B,)` leading valid keys or None.
        config: sparsity, tile, budget and backend.
        scale: factor on the scores, `D ** -0.5` by default.

    Returns:
        The attention, `(B, S, H, D)`, and `kv_num_blocks`, `(B, H, N)` int32: what was really computed.
    """
    # Only compiled graphs need the opaque operator. Eager calls stay transparent to autograd.
    run = _attend_op if torch.compiler.is_compiling() else attend_with_fields
    return run(query, key, value, geometry, kv_len, *fields_of(config), scale)


def fields_of(config: DraftConfig) -> tuple[float, list[int], str, str]:
    """What `attend_with_fields` takes of a config, in its order."""
    return config.sparsity, list(config.tile), config.budget, config.backend


def attend_with_fields(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    geometry: Tensor,
    kv_len: Tensor | None,
    sparsity: float,
    tile: list[int],
    budget: str,
    backend: str,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """`attend` with the fields of its config one by one, as operators take them. Reads the numbers in `geometry`."""
    frames, rows, columns, prefix = geometry.tolist()
    _check_tensors(query, key, value, kv_len, prefix + frames * rows * columns)
    _, seq_len, _, head_dim = query.shape
    scale = head_dim**-0.5 if scale is None else scale
    layout = token_layout((frames, rows, columns), prefix, seq_len, tuple(tile), query.device)
    differentiable = needs_grad(query, key, value)
    kernel = kernels.choose(backend, query.device, query.dtype, head_dim, layout.block, differentiable)

    steps = steps_for(query, key, value)
    query, query_means = steps.order(query, layout)
    key, key_means = steps.order(key, layout)
    value, _ = steps.order(value, layout, average=False)
    mask = steps.select(query_means, key_means, scale, sparsity, budget, layout, kv_len)
    out = kernel.forward(query, key, value, mask, scale)
    return steps.restore(out, layout), mask.kv_num_blocks


def needs_grad(*tensors: Tensor) -> bool:
    """Says whether autograd records what is done with these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def steps_for(*tensors: Tensor) -> ModuleType:
    """Fused in Triton on GPUs; plain torch elsewhere, and where gradients are needed."""
    if needs_grad(*tensors) or not tensors[0].is_cuda or not find_spec("triton"):
        return plain
    return importlib.import_module(".steps.fused", __package__)


_attend_op = torch.library.custom_op("diffusers_draft::attend", attend_with_fields, mutates_args=())


@_attend_op.register_fake
def _(query, key, value, geometry, kv_len, sparsity, tile, budget, backend, scale):
    return query.new_empty(query.shape), fake_counts(query, query.shape[1], query.shape[2], tile)


def fake_counts(query: Tensor, seq_len: int, heads: int, tile: list[int]) -> Tensor:
    """An empty `kv_num_blocks`, `(B, heads, N)`, for the shapes of compiled code."""
    block = math.prod(tile)
    return query.new_empty((query.shape[0], heads, (seq_len + block - 1) // block), dtype=torch.int32)


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, kv_len: Tensor | None, video_end: int) -> None:
    if query.dim() != 4 or not query.shape == key.shape == value.shape:
        raise ValueError(
            "query, key and value must have one shape (B, S, H, D), got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}."
        )
    for name in ("dtype", "device"):
        found = [getattr(tensor, name) for tensor in (query, key, value)]
        if len(set(found)) > 1:
            raise ValueError(f"query, key and value must have the same {name}, got {', '.join(map(str, found))}.")
    if kv_len is None:
        return
    if not isinstance(kv_len, Tensor):
        raise ValueError(f"kv_len must be a tensor of {query.shape[0]} integers, got {kv_len!r}.")
    if kv_len.shape != (query.shape[0],) or kv_len.is_floating_point():
        raise ValueError(
            f"kv_len must hold one integer for each of the {query.shape[0]} samples, got shape "
            f"{tuple(kv_len.shape)} and dtype {kv_len.dtype}."
        )
    # Lengths on an accelerator are not read: that would wait for the device.
    if kv_len.device.type == "cpu" and not (video_end <= int(kv_len.min()) and int(kv_len.max()) <= query.shape[1]):
        raise ValueError(
            f"kv_len must lie between prefix + T * Y * X = {video_end} and S = {query.shape[1]}, got "
            f"{kv_len.tolist()}: only tokens behind the video can be padding."
        )
