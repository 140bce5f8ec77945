"""One attention call, step by step: order, draft, select, attend, correct, restore."""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import kernels
from .block_mask import BlockMask
from .correct import Correction, probe_rows
from .draft import draft_map
from .draft import value as value_score
from .layout import TokenLayout, token_layout
from .method import Method
from .select import select, skips_pairs
from .steps import Steps, steps_for

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
"""Dtypes of lengths."""
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of queries, keys and values."""


@dataclass(frozen=True)
class Call:
    """An attention call in block order.

    Whoever wants to stop between the steps, or to choose blocks by something else than the draft, runs them one by
    one; `diffusers_draft.attention.ops.attend` runs them all.

    Attributes:
        query: `(B, S, H, D)` in block order.
        key: as `query`.
        value: as `query`.
        query_means: `(B, H, Nv, D)` float32, the mean of each video block.
        key_means: as `query_means`.
        value_means: as `query_means`; None where the score does not need them.
        layout: the block order.
        kv_len: `(B,)` leading valid keys or None.
        scale: factor on the scores.
        method: how blocks are chosen.
        kernel: what attends.
        steps: what orders, selects and restores.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    query_means: Tensor
    key_means: Tensor
    value_means: Tensor | None
    layout: TokenLayout
    kv_len: Tensor | None
    scale: float
    method: Method
    kernel: kernels.Choice
    steps: Steps

    @classmethod
    def order(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        geometry: Tensor,
        kv_len: Tensor | None,
        method: Method,
        scale: float | None = None,
    ) -> "Call":
        """Check the tensors, put them in block order and average the video blocks.

        Args:
            query: `(B, S, H, D)` in the model's order.
            key: as `query`.
            value: as `query`.
            geometry: `(4,)` int64 on the CPU: T, Y, X and the prefix.
            kv_len: `(B,)` leading valid keys or None.
            method: how blocks are chosen.
            scale: factor on the scores, `D ** -0.5` by default.

        Raises:
            ValueError: for tensors whose shapes do not fit each other or the grid.
            ImportError: if the package of the backend is missing.
            RuntimeError: if the backend cannot run on these tensors.
        """
        frames, rows, columns, prefix = geometry.tolist()
        _check_tensors(query, key, value, kv_len, prefix + frames * rows * columns)
        seq_len, head_dim = query.shape[1], query.shape[3]
        layout = token_layout((frames, rows, columns), prefix, seq_len, method.tile, query.device)
        differentiable = needs_grad(query, key, value)
        kernel = kernels.choose(method.backend, query.device, query.dtype, head_dim, layout.block, differentiable)
        steps = steps_for(query.device, query.dtype, head_dim, differentiable)
        ordered_query, query_means = steps.order(query, layout)
        ordered_key, key_means = steps.order(key, layout)
        ordered_value, value_means = steps.order(value, layout, average=method.score == "value")
        assert query_means is not None and key_means is not None, "they were asked for"
        return cls(
            ordered_query,
            ordered_key,
            ordered_value,
            query_means,
            key_means,
            value_means,
            layout,
            kv_len,
            head_dim**-0.5 if scale is None else scale,
            method,
            kernel,
            steps,
        )

    def draft(self) -> Tensor:
        """Compute the draft map, `(B, H, Nv, Nv)` float32."""
        return draft_map(self.query_means, self.key_means, self.scale)

    def scores(self) -> Tensor:
        """Compute the scores that `select` goes by, `(B, H, Nv, Nv)` float32."""
        return self.draft() if self.value_means is None else value_score(self.draft(), self.value_means)

    def select(self, sparsity: float, scores: Tensor | None = None) -> BlockMask:
        """Choose the pairs of blocks to keep.

        Args:
            sparsity: share of the pairs of video blocks to skip, in [0, 1).
            scores: `(B, H, Nv, Nv)` float32, the largest are kept; by default those of the method.
        """
        if scores is None:
            means = self.query_means, self.key_means, self.value_means
            return self.steps.select(*means, self.scale, sparsity, self.method.budget, self.layout, self.kv_len)
        return select(
            scores.clone(),  # its diagonal is overwritten
            sparsity,
            self.method.budget,
            seq_len=self.layout.seq_len,
            block=self.layout.block,
            kv_len=self.kv_len,
        )

    def attend(self, mask: BlockMask) -> Tensor:
        """Attend to the kept blocks: `(B, S, H, D)` in block order."""
        return self.kernel.forward(self.query, self.key, self.value, mask, self.scale)

    def skips_pairs(self, sparsity: float) -> bool:
        """Return True if any pair of blocks is left out."""
        return skips_pairs(self.layout.num_video_blocks, sparsity, self.method.budget)

    def correct(self, out: Tensor, number: int = 0) -> Correction:
        """Fit the correction of an output in block order, from exact attention of a few of its rows.

        Args:
            out: `(B, S, H, D)`, from `attend`.
            number: shifts the rows that are looked at.
        """
        video = self.layout.num_video_blocks * self.layout.block
        rows = probe_rows(video, self.method.probes, number, out.device)
        with torch.no_grad():
            return self.steps.correct(out, rows, self.query, self.key, self.value, self.kv_len, self.scale)

    def restore(self, out: Tensor, correction: Correction | None = None) -> Tensor:
        """Correct the output and put it back in the model's order, contiguous."""
        return self.steps.restore(out, self.layout, correction)


def needs_grad(*tensors: Tensor) -> bool:
    """Return True if gradients are enabled and any tensor requires one."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, kv_len: Tensor | None, video_end: int) -> None:
    for tensor in (query, key, value):
        if tensor.is_nested or tensor.layout is not torch.strided:
            kind = "a nested tensor" if tensor.is_nested else str(tensor.layout)
            raise ValueError(
                f"query, key and value must be dense torch tensors, got {kind}. Pad it, or use to_dense()."
            )
    if query.dim() != 4 or not query.shape == key.shape == value.shape:
        raise ValueError(
            "query, key and value must have one shape (B, S, H, D), got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}."
        )
    for name in ("dtype", "device"):
        found = [getattr(tensor, name) for tensor in (query, key, value)]
        if len(set(found)) > 1:
            raise ValueError(f"query, key and value must have the same {name}, got {', '.join(map(str, found))}.")
    if query.dtype not in FLOATS:
        raise ValueError(
            f"query, key and value must be float64, float32, float16 or bfloat16, got {query.dtype}. Cast them."
        )
    if not query.numel():
        raise ValueError(
            "query, key and value must have at least one sample, token, head and dimension, got shape (B, S, H, D) = "
            f"{tuple(query.shape)}. Skip the call for empty tensors."
        )
    if kv_len is not None:
        _check_lengths(kv_len, query, video_end)


def _check_lengths(kv_len: Tensor, query: Tensor, video_end: int) -> None:
    if not isinstance(kv_len, Tensor):
        raise ValueError(f"kv_len must be a tensor of {query.shape[0]} integers, got {kv_len!r}. Use torch.tensor.")
    if kv_len.shape != (query.shape[0],) or kv_len.dtype not in INTEGERS:
        raise ValueError(
            f"kv_len must hold one integer for each of the {query.shape[0]} samples, got shape "
            f"{tuple(kv_len.shape)} and dtype {kv_len.dtype}."
        )
    if kv_len.device.type == "meta":
        raise ValueError(f"kv_len must have values, got a tensor on the meta device. Make it on {query.device}.")
    # Lengths on an accelerator are not read: that would wait for the device.
    if kv_len.device.type == "cpu" and not (video_end <= int(kv_len.min()) and int(kv_len.max()) <= query.shape[1]):
        raise ValueError(
            f"kv_len must lie between prefix + T * Y * X = {video_end} and S = {query.shape[1]}, got "
            f"{kv_len.tolist()}: only tokens behind the video can be padding."
        )
