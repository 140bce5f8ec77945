"""Compile one fused kernel as its callers do, for GPUs of several generations, and print how much memory it shares."""

import json
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from diffusers_draft.attention.steps import fused_exact, fused_fit, fused_order, fused_scores

LIMITS = {89: 99 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that a thread block may have, by compute capability; 8.6 and 12.0 have as much as 8.9, 8.0
more."""
HEAD_DIM = 128
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
SIZES = {"HEAD_DIM": HEAD_DIM, "PADDED_DIM": HEAD_DIM}
MEANS = {"q_ptr": "*fp32", "k_ptr": "*fp32", "v_ptr": "*fp16", "scale": "fp32", "nearest": "fp32"}
LAUNCHES: dict[str, list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]]] = {
    "outputs": [(fused_scores._outputs_kernel, MEANS, SIZES | {"TILE": 64}, {"num_warps": 4, "num_stages": 1})],
    "scores": [
        (
            fused_scores._scores_kernel,
            MEANS | {"out_ptr": "*fp16"},
            SIZES | {"CHUNK": 32, "TILE": 128, "BY_VALUE": True},
            {"num_warps": 8},
        )
    ],
    "standardise": [
        (fused_scores._standardise_kernel, {"scaled_ptr": "*fp16"}, SIZES | {"TILE": 64}, {"num_warps": 8})
    ],
    "fit": [
        (
            fused_fit._fit_kernel,
            {"out_ptr": f"*{dtype}", "rows_ptr": "*i64"},
            SIZES | {"SPLITS": 11, "PROBES": 64, "PADDED": 64, "RIDGE": 0.1, "LEAST": 1e-6},
            {"num_warps": 8},
        )
        for dtype in ("bf16", "fp32")
    ],
    "exact": [
        (
            fused_exact._exact_kernel,
            dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), f"*{dtype}") | {"kv_len_ptr": "*i32", "scale": "fp32"},
            SIZES | {"ROWS": 64, "KEYS": fused_exact.KEYS, "HAS_LEN": True},
            {"num_warps": 4, "num_stages": 3 if dtype == "bf16" else 1},
        )
        for dtype in ("bf16", "fp32")
    ],
    "restore": [
        (
            fused_order._restore_kernel,
            {"out_ptr": f"*{NAMES[dtype]}", "restored_ptr": f"*{NAMES[dtype]}", "inverse_ptr": "*i64"},
            SIZES | {"ROWS": fused_order.corrected_rows(dtype), "TILES": fused_order.CORRECTED_TILES, "CORRECT": True},
            {"num_warps": 8},
        )
        for dtype in NAMES
    ],
}
"""Kernel, types of arguments that are neither float32 pointers nor integers, constants and options of each launch."""


def shared_bytes(kernel: Any, types: dict[str, str], constants: dict[str, Any], options: dict[str, int], target: int):
    names = kernel.arg_names
    usual = {name: "*fp32" if name.endswith("_ptr") else "i32" for name in names}
    signature = usual | types | dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        kernel,
        {name: signature[name] for name in names},
        {(names.index(name),): value for name, value in constants.items()},
    )
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options).metadata.shared


def targets(name: str) -> dict[int, int]:
    """List the GPUs that a kernel must fit: the fit is left to plain torch on those with little shared memory."""
    return {90: LIMITS[90]} if name == "fit" else LIMITS


name = sys.argv[1]
found = [
    {"kernel": kernel.__name__, "target": target, "bytes": shared_bytes(kernel, *launch, target), "limit": limit}
    for kernel, *launch in LAUNCHES[name]
    for target, limit in targets(name).items()
]
print(json.dumps(found))
