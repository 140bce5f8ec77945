"""Benchmark of one attention call: dense baselines, backends and stages, each checked before it is timed."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ...attention import draft_attention
from ...attention.block_mask import BlockMask
from ...attention.call import Call
from ...attention.layout import Tile
from ...attention.method import Budget, Method
from .measure import Time, measure
from .shapes import Shape

TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Largest relative error, against reference rows, at which a result is timed, by dtype."""


@dataclass(frozen=True)
class Row:
    """One row of the benchmark's table.

    Attributes:
        name: what was run.
        kind: `"dense"`, `"draft"` (the whole operator) or `"stage"`.
        sparsity: the requested sparsity; None for dense.
        budget: `"head"` or `"row"`; None for dense.
        time: the measured time; None if the call failed or its result was wrong.
        density: computed share of the block pairs.
        error: relative error against reference rows, on sampled query blocks.
        note: why there is no time.
    """

    name: str
    kind: str
    sparsity: float | None = None
    budget: str | None = None
    time: Time | None = None
    density: float | None = None
    error: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Case:
    """Query, key and value of one shape, `(B, S, H, D)` each, and the least time to measure, in seconds."""

    shape: Shape
    tensors: tuple[Tensor, ...]
    seconds: float

    @property
    def scale(self) -> float:
        return self.shape.head_dim**-0.5


def run_dense(case: Case) -> Iterator[Row]:
    """Time diffusers' default dense attention and every dense kernel that is available here."""
    for name, call in _dense_calls(case).items():
        yield _checked_row(name, "dense", case, call, _dense_rows(case))


def run_draft(case: Case, sparsity: float, budget: Budget, tile: Tile, backends: list[str]) -> Iterator[Row]:
    """Time the whole operator with each backend, and each stage with the backend that `auto` chooses."""
    query, key, value = case.tensors
    state = _stages(case, sparsity, budget, tile)
    mask: BlockMask = state["mask"]
    expected = _sparse_rows(case, state)
    facts: dict[str, Any] = {"sparsity": sparsity, "budget": budget, "density": float(mask.density())}
    for backend in backends:

        def call(backend: str = backend) -> Tensor:
            return draft_attention(
                query, key, value, case.shape.grid, sparsity=sparsity, budget=budget, tile=tile, backend=backend
            )

        yield _checked_row(backend, "draft", case, call, expected, **facts)
    for name, call in state["calls"].items():
        yield Row(f"stage: {name}", "stage", time=measure(call, case.seconds), **facts)


def _dense_calls(case: Case) -> dict[str, Callable[[], Tensor]]:
    query, key, value = case.tensors
    q, k, v = (tensor.transpose(1, 2) for tensor in case.tensors)

    def sdpa(backend: SDPBackend) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v).transpose(1, 2)

        return call

    def diffusers_default() -> Tensor:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        padding = None
        if case.shape.text:  # HunyuanVideo passes a mask even when nothing is padded
            padding = torch.ones(case.shape.batch, 1, 1, case.shape.seq_len, dtype=torch.bool, device=query.device)
        return dispatch_attention_fn(query, key, value, attn_mask=padding)

    def sdpa_default() -> Tensor:
        return scaled_dot_product_attention(q, k, v).transpose(1, 2)

    calls = {"diffusers default": diffusers_default, "sdpa": sdpa_default}
    if query.is_cuda:
        calls["sdpa flash"] = sdpa(SDPBackend.FLASH_ATTENTION)
        calls["sdpa cudnn"] = sdpa(SDPBackend.CUDNN_ATTENTION)
        with contextlib.suppress(ImportError):
            from flash_attn.cute.interface import _flash_attn_fwd

            calls["fa4"] = lambda: _flash_attn_fwd(query, key, value, softmax_scale=case.scale)[0]
    return calls


def _stages(case: Case, sparsity: float, budget: Budget, tile: Tile) -> dict[str, Any]:
    """Run the operator once, stage by stage; return its mask and layout, and a call for each stage."""
    query, key, value = case.tensors
    geometry = torch.tensor([*case.shape.grid, 0])
    method = Method(budget=budget, tile=tile)

    def order() -> Call:
        return Call.order(query, key, value, geometry, None, method)

    call = order()
    mask = call.select(sparsity)
    out = call.attend(mask)
    correction = call.correct(out) if call.skips_pairs(sparsity) else None
    calls = {
        "order": order,
        "draft and select": lambda: call.select(sparsity),
        f"kernel ({call.kernel.name})": lambda: call.attend(mask),
        "correct": lambda: call.correct(out),
        "restore": lambda: call.restore(out, correction),
    }
    return {"mask": mask, "layout": call.layout, "correction": correction, "calls": calls}


Expected = list[tuple[tuple[Any, ...], Tensor]]
"""Indices into a `(B, S, H, D)` result and the float32 values expected there, computed in float64."""


def _sampled_rows(case: Case, num_blocks: int) -> Iterator[tuple[int, int, int]]:
    """Sample (batch index, head, query block): the first block, the last one and six random ones."""
    generator = torch.Generator().manual_seed(0)
    for row in [0, num_blocks - 1, *torch.randint(num_blocks, (6,), generator=generator).tolist()]:
        yield case.shape.batch - 1, int(torch.randint(case.shape.heads, (1,), generator=generator)), row


def _dense_rows(case: Case, block: int = 128) -> Expected:
    """Compute dense attention of sampled query blocks."""
    return [
        (where, _attend_row(case, where, slice(None)))
        for sample, head, row in _sampled_rows(case, -(-case.shape.seq_len // block))
        for where in [(sample, slice(row * block, (row + 1) * block), head)]
    ]


def _sparse_rows(case: Case, state: dict[str, Any]) -> Expected:
    """Compute attention of sampled query blocks to the keys that the mask keeps, and correct it."""
    mask, order, correction = state["mask"], state["layout"].order, state["correction"]
    expected = []
    for sample, head, row in _sampled_rows(case, mask.kv_num_blocks.shape[-1]):
        kept = mask.kv_indices[sample, head, row, : mask.kv_num_blocks[sample, head, row]].long()
        keys = (kept[:, None] * mask.block + torch.arange(mask.block, device=kept.device)).flatten()
        where = (sample, order[row * mask.block : (row + 1) * mask.block], head)
        rows = _attend_row(case, where, order[keys[keys < mask.seq_len]])
        if correction is not None and row < mask.num_video_blocks:
            rows = rows + rows @ correction.matrix[sample, head] + correction.offset[sample, head]
        expected.append((where, rows))
    return expected


def _attend_row(case: Case, where: tuple[Any, ...], keys: Any) -> Tensor:
    query, key, value = case.tensors
    sample, _, head = where
    scores = query[where].double() @ key[sample, keys, head].double().T * case.scale
    return (torch.softmax(scores, dim=-1) @ value[sample, keys, head].double()).float()


def _checked_row(
    name: str, kind: str, case: Case, call: Callable[[], Tensor], expected: Expected, **facts: Any
) -> Row:
    """Time a call if its result is right; otherwise return a row that says why there is no time."""
    try:
        out = call()
    except (ImportError, RuntimeError, ValueError) as failure:
        return Row(name, kind, note=str(failure).split("\n")[0], **facts)
    difference = sum(float((out[where].float() - rows).square().sum()) for where, rows in expected)
    error = (difference / sum(float(rows.square().sum()) for _, rows in expected)) ** 0.5
    del out
    if not error <= TOLERANCE[case.tensors[0].dtype]:
        return Row(name, kind, error=error, note="wrong numbers, not timed", **facts)
    return Row(name, kind, time=measure(call, case.seconds), error=error, **facts)
