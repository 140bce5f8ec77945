"""A one-off check of a backend's numbers, before it is trusted with a video."""

import torch

from ..block_mask import BlockMask
from . import reference

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Largest relative error; float32 leaves room for TF32. A backend that ignores the mask is off by more than 0.1."""


def check(name: str, forward, device: torch.device, dtype: torch.dtype, head_dim: int, block: int) -> None:
    """Compare `forward` with the reference on a small ragged problem with two different lengths.

    Raises:
        RuntimeError: if the backend fails, or if its result differs from the reference.
        torch.OutOfMemoryError: if the device has too little memory left for the check.
    """
    if dtype not in TOLERANCE:
        raise RuntimeError(f"Backend {name!r} needs float64, float32, float16 or bfloat16 tensors, got {dtype}.")
    scale = 0.5 * head_dim**-0.5  # not the one that a backend has by default
    with torch.inference_mode(False), torch.no_grad():
        with torch.device("cpu"):  # whatever the default device is
            query, key, value, mask = _problem(device, dtype, head_dim, block)
        try:
            out = forward(query, key, value, mask, scale)
        except torch.OutOfMemoryError:  # says nothing about the backend
            raise
        except Exception as failure:
            raise RuntimeError(f"Backend {name!r} cannot run on {device} in {dtype}: {failure}") from failure
        exact = torch.promote_types(dtype, torch.float32)
        expected = reference.forward(query.to(exact), key.to(exact), value.to(exact), mask, scale)
        error = ((out.to(exact) - expected).norm() / expected.norm()).item()
    if not error <= TOLERANCE[dtype]:
        raise RuntimeError(
            f"Backend {name!r} gives wrong numbers on {device} in {dtype} with head_dim {head_dim} and blocks of "
            f"{block}: relative error {error:.1e} to the reference, expected at most {TOLERANCE[dtype]:.0e}. "
            "It may be ignoring the block mask or the scale; choose another backend."
        )


def _problem(device: torch.device, dtype: torch.dtype, head_dim: int, block: int):
    batch, heads, num_blocks = 2, 2, 6 if block <= 256 else 3  # the reference has everything of size S x S
    full = num_blocks - 1
    seq_len = full * block + block // 2 + 1
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(batch, seq_len, heads, head_dim, dtype=torch.float32, generator=generator).to(device, dtype)
        for _ in range(3)
    )
    kv_len = torch.tensor([seq_len - 3, full * block - 7], dtype=torch.int32)
    tail = (kv_len - 1) // block
    kept = torch.rand(batch, heads, num_blocks, num_blocks, dtype=torch.float32, generator=generator) < 0.4
    kept |= torch.eye(num_blocks, dtype=torch.bool)
    kept &= torch.arange(num_blocks) <= tail[:, None, None, None]
    kept[torch.arange(batch), :, :, tail] = True
    kv_num_blocks = kept.sum(-1, dtype=torch.int32)
    kv_indices = kept.int().argsort(dim=-1, descending=True, stable=True).int()
    tensors = (kv_num_blocks.to(device), kv_indices.to(device), kv_len.to(device))
    return query, key, value, BlockMask(*tensors, seq_len=seq_len, block=block, num_video_blocks=num_blocks)
