"""Dense kernels that stand in for the attention of a patched transformer."""

import contextlib
import functools

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ...patching.forward import AttentionCall, Hook
from .measure import measure
from .shapes import Shape, random_inputs

NO_ATTENTION = "no attention"
"""Name of the step whose attention returns `value` unchanged: it measures everything but attention."""


def dense_kernels(device: torch.device) -> list[str]:
    """List the dense kernels that are available on a device."""
    if device.type != "cuda":
        return ["sdpa"]
    kernels = ["cudnn"]
    with contextlib.suppress(ImportError):
        import flash_attn.cute.interface  # noqa: F401

        kernels.append("fa4")
    return kernels


@torch.library.custom_op("diffusers_draft_bench::dense", mutates_args=())
def _dense(query: Tensor, key: Tensor, value: Tensor, kernel: str) -> Tensor:
    """Run one dense kernel, or return a copy of `value` for `"no"`."""
    if kernel == "no":
        return value.clone(memory_format=torch.contiguous_format)
    if kernel == "fa4":
        from flash_attn.cute.interface import _flash_attn_fwd

        return _flash_attn_fwd(query, key, value)[0]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if kernel == "cudnn" else contextlib.nullcontext():
        out = scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return out.transpose(1, 2).contiguous()


@_dense.register_fake
def _(query, key, value, kernel):
    return query.new_empty(query.shape)


def through(kernel: str) -> Hook:
    """Make a hook that attends with a dense kernel, or not at all.

    No mask is used: at most a second text is padded, by a few hundred keys of a hundred thousand.
    """

    def attend(call: AttentionCall) -> Tensor:
        return _dense(call.query, call.key, call.value, kernel)

    return attend


def fastest(shape: Shape, device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> str:
    """Name the fastest dense kernel of this device for one attention call of a shape."""
    tensors = random_inputs(shape, device, dtype)
    times = {}
    for kernel in dense_kernels(device):
        times[kernel] = measure(functools.partial(_dense, *tensors, kernel), seconds).median
    return min(times, key=times.__getitem__)
