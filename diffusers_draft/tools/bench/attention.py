"""Benchmark of one attention call: dense baselines, backends and stages, each checked before it is timed."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ...attention import draft_attention
from ...attention.block_mask import BlockMask
from ...attention.call import Call
from ...attention.correct import Correction
from ...attention.method import NAMES, Method
from ...config import DraftConfig
from .measure import Time, measure
from .reference import Case, Expected, relative_error, sparse_blocks

TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Largest relative error, against reference rows, at which a result is timed, by dtype."""

UNCORRECTED = "without correction"
PAPER = "paper"
"""Names of the rows that the backends' rows are compared with."""


@dataclass(frozen=True)
class Row:
    """One row of the benchmark's table.

    Attributes:
        name: what was run.
        kind: `"dense"`, `"draft"` (the whole operator), `"stage"` or `"rival"` (another whole operator).
        sparsity: the requested sparsity; None for dense.
        budget: `"head"` or `"row"`; None for what has none.
        time: the measured time; None if the call failed or its result was wrong.
        density: computed share of the block pairs.
        error: relative error against reference rows, on sampled query blocks.
        note: why there is no time.
        dense_error: relative error against dense attention, on sampled video rows: what the sparsity costs.
    """

    name: str
    kind: str
    sparsity: float | None = None
    budget: str | None = None
    time: Time | None = None
    density: float | None = None
    error: float | None = None
    note: str = ""
    dense_error: float | None = None


@dataclass(frozen=True)
class _Sparse:
    """A sparse call that ran once, step by step."""

    method: Method
    sparsity: float
    call: Call
    mask: BlockMask
    out: Tensor
    correction: Correction | None

    @property
    def facts(self) -> dict[str, Any]:
        """What all rows of the call have in common."""
        return {"sparsity": self.sparsity, "budget": self.method.budget, "density": float(self.mask.density())}


def run_dense(case: Case) -> Iterator[Row]:
    """Time diffusers' default dense attention and every dense kernel that is available here."""
    for name, call in _dense_calls(case).items():
        yield _checked_row(name, "dense", case, call, case.dense_blocks)


def run_draft(case: Case, sparsity: float, method: Method, backends: list[str]) -> Iterator[Row]:
    """Time the operator with each backend; with the method's own also without correction and step by step."""
    sparse = _run_once(case, sparsity, method)
    for backend in backends:
        yield _draft_row(backend, case, sparse, replace(method, backend=backend))
    yield _draft_row(UNCORRECTED, case, replace(sparse, correction=None), replace(method, probes=0))
    for name, call in _stages(case, sparse).items():
        yield Row(f"stage: {name}", "stage", time=measure(call, case.seconds), **sparse.facts)


def run_paper(case: Case, sparsity: float) -> Row:
    """Time the whole operator with the settings of the paper's code and the backend that `auto` chooses."""
    method = DraftConfig.paper(sparsity).method
    return _draft_row(PAPER, case, _run_once(case, sparsity, method), method)


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


def _run_once(case: Case, sparsity: float, method: Method) -> _Sparse:
    call = _order(case, method)
    mask = call.select(sparsity)
    out = call.attend(mask)
    correction = call.correct(out) if method.probes and call.skips_pairs(sparsity) else None
    return _Sparse(method, sparsity, call, mask, out, correction)


def _order(case: Case, method: Method) -> Call:
    query, key, value = case.tensors
    return Call.order(query, key, value, torch.tensor([*case.shape.grid, 0]), None, method)


def _stages(case: Case, sparse: _Sparse) -> dict[str, Callable[[], object]]:
    """Make a call for each step of the operator."""
    call, mask, out, correction = sparse.call, sparse.mask, sparse.out, sparse.correction
    calls: dict[str, Callable[[], object]] = {
        "order": lambda: _order(case, sparse.method),
        "draft and select": lambda: call.select(sparse.sparsity),
        f"kernel ({call.kernel.name})": lambda: call.attend(mask),
    }
    if correction is not None:
        calls["correct"] = lambda: call.correct(out)
    return calls | {"restore": lambda: call.restore(out, correction)}


def _draft_row(name: str, case: Case, sparse: _Sparse, method: Method) -> Row:
    """Time the whole operator with a method that chooses the same blocks as the one that ran once."""
    query, key, value = case.tensors
    settings: dict[str, Any] = {setting: getattr(method, setting) for setting in NAMES}

    def call() -> Tensor:
        return draft_attention(query, key, value, case.shape.grid, sparsity=sparse.sparsity, **settings)

    expected = sparse_blocks(case, sparse.call.layout, sparse.mask, sparse.correction)
    return _checked_row(name, "draft", case, call, expected, **sparse.facts)


def _checked_row(
    name: str, kind: str, case: Case, call: Callable[[], Tensor], expected: Expected, **facts: Any
) -> Row:
    """Time a call if its result is right; otherwise return a row that says why there is no time."""
    try:
        out = call()
    except (ImportError, RuntimeError, ValueError) as failure:
        return Row(name, kind, note=str(failure).split("\n")[0], **facts)
    error = relative_error(out, expected)
    dense_error = None if kind == "dense" else relative_error(out, case.dense_video)
    del out
    row = Row(name, kind, error=error, dense_error=dense_error, **facts)
    if not error <= TOLERANCE[case.tensors[0].dtype]:
        return replace(row, note="wrong numbers, not timed")
    return replace(row, time=measure(call, case.seconds))
