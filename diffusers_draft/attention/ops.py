"""Draft attention as one operator, which compiled code calls without being tied to a number or a setting."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import kernels
from .block_mask import BlockMask
from .call import Call
from .method import Method

AUTOCAST_DEVICES = [name for name in ("cpu", "cuda", "xpu", "mps", "hpu") if torch.amp.is_autocast_available(name)]
"""Found out once: older `torch.compile` cannot ask."""


class Attended(NamedTuple):
    """What an attention call gives.

    Attributes:
        out: `(B, S, H, D)`, contiguous, in the model's order.
        pairs: `(B,)` int64 on the device, computed pairs of blocks in all heads of each sample.
        squares: `(3,)` float32 on the device, as `Correction` has them; zeros where nothing was corrected.
        facts: `(4,)` int64 on the CPU: heads, blocks in all, video blocks, and the number of the kernel that ran,
            see `kernels.choice_of`.
    """

    out: Tensor
    pairs: Tensor
    squares: Tensor
    facts: Tensor


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    geometry: Tensor,
    kv_len: Tensor | None,
    numbers: Tensor,
    method: Tensor,
    scale: float | None = None,
) -> Attended:
    """Run draft attention, eager or under `torch.compile`: nothing in the graph depends on what the numbers are.

    Args:
        query: `(B, S, H, D)`.
        key: as `query`.
        value: as `query`.
        geometry: `(4,)` int64 on the CPU: T, Y, X and the prefix.
        kv_len: `(B,)` leading valid keys or None.
        numbers: `(2,)` float64 on the CPU, what may differ from step to step: the sparsity, and a whole number that
            shifts the rows that correct the others.
        method: from `Method.to_tensor`.
        scale: factor on the scores, `D ** -0.5` by default.

    Raises:
        ValueError: for tensors whose shapes do not fit each other or the grid.
        ImportError: if the package of the backend is missing.
        RuntimeError: if the backend cannot run on these tensors, or has no backward and they need one.
    """
    query, key, value = in_autocast_dtype(query, key, value)
    # Only compiled graphs need the opaque operator, and meta tensors its shapes. Eager calls stay open to autograd.
    opaque = torch.compiler.is_compiling() or all(tensor.device.type == "meta" for tensor in (query, key, value))
    run = _attend_op if opaque else attend_now
    return Attended(*run(query, key, value, geometry, kv_len, numbers, method, scale))


def attend_now(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    geometry: Tensor,
    kv_len: Tensor | None,
    numbers: Tensor,
    method: Tensor,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run all steps of `Call`; arguments and results are those of `attend`."""
    return attend_by(None, query, key, value, geometry, kv_len, numbers, method, scale)


def attend_by(
    scores: Callable[[Call], Tensor] | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    geometry: Tensor,
    kv_len: Tensor | None,
    numbers: Tensor,
    method: Tensor,
    scale: float | None = None,
) -> Attended:
    """Run all steps of `Call`, choosing blocks by scores as `Call.select` takes them, or by the method's own for None.

    The other arguments, and the results, are those of `attend`. For models that are not compiled.
    """
    query, key, value = in_autocast_dtype(query, key, value)
    # Kernels run on the current device, which need not be that of the tensors.
    with torch.accelerator.device_index(query.device.index), _without_autocast(query.device.type):
        call = Call.order(query, key, value, geometry, kv_len, Method.from_tensor(method), scale)
        sparsity, number = numbers.tolist()
        mask = call.select(sparsity, None if scores is None else scores(call))
        return attended(call, mask, sparsity, int(number))


def attended(call: Call, mask: BlockMask, sparsity: float, number: int = 0) -> Attended:
    """Run the steps behind the choice of blocks.

    Args:
        call: in block order.
        mask: what to attend to.
        sparsity: what it was chosen for; where that leaves out nothing, nothing is corrected.
        number: as `Call.correct` takes it.
    """
    out = call.attend(mask)
    correction = call.correct(out, number) if call.method.probes and call.skips_pairs(sparsity) else None
    squares = out.new_zeros(3, dtype=torch.float32) if correction is None else correction.squares
    heads, blocks = mask.kv_num_blocks.shape[1:]
    facts = torch.tensor([heads, blocks, mask.num_video_blocks, kernels.number_of(call.kernel)], device="cpu")
    return Attended(call.restore(out, correction), mask.kv_num_blocks.sum((1, 2)), squares, facts)


def in_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as autocast casts what goes into stock attention: float64 stays."""
    device = tensors[0].device.type
    if device not in AUTOCAST_DEVICES or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
        for tensor in tensors
    )


def _without_autocast(device: str) -> contextlib.AbstractContextManager[None]:
    return torch.autocast(device, enabled=False) if device in AUTOCAST_DEVICES else contextlib.nullcontext()


_attend_op = torch.library.custom_op("diffusers_draft::attend", attend_now, mutates_args=())


@_attend_op.register_fake
def _(query, key, value, geometry, kv_len, numbers, method, scale):
    return query.new_empty(query.shape), *empty_facts(query)


def _refuse_backward(*_: Any) -> None:
    raise RuntimeError(
        "Draft attention has no backward under torch.compile. Train without compiling, or run inference under "
        "torch.no_grad()."
    )


_attend_op.register_autograd(_refuse_backward)


def empty_facts(query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Make what `Attended` has beside the output for the shapes of compiled code."""
    pairs = query.new_empty(query.shape[0], dtype=torch.int64)
    squares = query.new_empty(3, dtype=torch.float32)
    return pairs, squares, torch.empty(4, dtype=torch.int64, device="cpu")
