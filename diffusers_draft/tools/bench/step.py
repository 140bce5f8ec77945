"""Benchmark of one denoising step of a real transformer at its real width, dense and with draft attention.

Weights are random and only a few blocks are built. The time of a block is the difference between forwards with more
and with fewer blocks of its kind; the time of the whole step is the sum over all blocks.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ...api import enable_draft_attention
from ...attention.method import Budget
from ...config import DraftConfig
from ...families import family_of
from ...patching.dispatch import exchange_of
from ...patching.forward import AttentionCall, Hook
from .measure import Time, measure
from .models import MODELS, Model
from .shapes import SHAPES

NO_ATTENTION = "no attention"
"""Name of the step whose attention returns `value` unchanged: it measures everything but attention."""
ONE_GPU = "draft on one GPU"
"""Name of the step with draft attention that is measured before the model is split over several GPUs."""
NOT_DENSE = (NO_ATTENTION, ONE_GPU)
"""Names of steps that do not compete for the best dense attention."""
BLOCKS = 4
"""Number of blocks of each kind that are built. The time of one block is the difference between all of them and one,
divided by their number less one, so that the noise of the two forwards is divided too."""
SAME = 2e-2
"""Largest relative error between bfloat16 outputs that count as equal."""


@dataclass(frozen=True)
class Step:
    """Measured times of a step with one kind of attention.

    Attributes:
        name: dense attention or draft attention, and with what.
        compiled: whether the repeated blocks were compiled.
        block_ms: milliseconds of one block of each kind.
        rest_ms: milliseconds of everything else in a forward.
        step_ms: milliseconds of a forward with the real number of blocks.
        times: the measured forwards, by number of blocks of each kind.
        memory_gib: peak memory of the forward beyond weights and inputs, on a GPU.
        exchange_ms: milliseconds of the exchanges between GPUs in one layer without attention. In draft attention they
            overlap with it in part.
    """

    name: str
    compiled: bool
    block_ms: dict[str, float]
    rest_ms: float
    step_ms: float
    times: dict[str, Time]
    memory_gib: float
    exchange_ms: float = 0.0


def run(
    name: str,
    *,
    sparsity: float | None,
    budget: Budget,
    backend: str,
    compiled: bool,
    device: torch.device,
    seconds: float,
    split: Callable[[nn.Module], None] | None = None,
) -> Iterator[Step]:
    """Measure a step with diffusers' default attention, no attention, dense kernels, and draft attention.

    Draft attention uses the paper's tile.

    Args:
        name: key of `MODELS`.
        sparsity: as in `DraftConfig`; by default the model's in `MODELS`.
        budget: as in `DraftConfig`.
        backend: as in `DraftConfig`.
        compiled: whether to compile the repeated blocks.
        device: the device to run on.
        seconds: least time to measure each forward.
        split: splits a transformer over GPUs. If given, draft attention on one GPU is measured first and the output
            of several GPUs is checked against it.

    Raises:
        RuntimeError: if the output of several GPUs differs from that of one.
    """
    model = MODELS[name]
    dtype = torch.bfloat16
    torch.manual_seed(0)  # so that all processes have the same model and inputs
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            transformer: Any = model.build(**{key: BLOCKS for _, key, _ in model.blocks}).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    inputs = model.inputs(SHAPES[model.shape], device, dtype)
    if compiled:
        transformer.compile_repeated_blocks(fullgraph=True)
    options: dict[str, Any] = {"dense_steps": 0, "dense_layers": (), "tile": DraftConfig.paper().tile}
    sparsity = model.sparsity if sparsity is None else sparsity

    def step(name: str) -> Step:
        return _step(name, transformer, model, inputs, compiled, seconds)

    def draft(name: str) -> tuple[Step, Tensor]:
        with enable_draft_attention(transformer, sparsity, budget=budget, backend=backend, **options) as handle:
            measured = step(name)
            print(handle.report())
            with torch.inference_mode():
                return measured, transformer(**inputs, return_dict=False)[0]

    expected = None
    if split:
        alone, expected = draft(ONE_GPU)
        yield alone
        split(transformer)
    yield step("diffusers default")
    for kernel in ("no", *_dense_kernels(device)):
        with enable_draft_attention(transformer, **options) as handle, handle._watched(_through(kernel)):
            yield step(NO_ATTENTION if kernel == "no" else f"dense {kernel}")
    measured, output = draft(f"draft {sparsity:g}")
    if expected is not None:
        _check_same(output, expected)
        measured = replace(measured, exchange_ms=_exchange_ms(transformer, inputs, seconds))
    yield measured


def _check_same(output: Tensor, expected: Tensor) -> None:
    """Raise RuntimeError if the output of several GPUs differs from that of one."""
    error = ((output.double() - expected.double()).norm() / expected.double().norm()).item()
    if not error < SAME:
        raise RuntimeError(f"Several GPUs give another output than one: relative error {error:.1e}, above {SAME:g}.")
    print(f"the output of several GPUs is that of one, relative error {error:.1e}")


def _exchange_ms(transformer: Any, inputs: dict[str, Tensor], seconds: float) -> float:
    """Measure one layer's exchanges, to heads and back, in milliseconds: all heads at once and without attention."""
    seen: list[AttentionCall] = []
    handle = enable_draft_attention(transformer, dense_layers=())
    with handle, handle._watched(seen.append), torch.inference_mode(), torch.compiler.set_stance("force_eager"):
        transformer(**inputs, return_dict=False)
        exchange = exchange_of(handle._attachments["transformer"].forward, transformer._parallel_config)
        assert exchange is not None, "the transformer is split"
        query, key, value = (exchange.to_tokens(tensor) for tensor in seen[0][:3])
        return measure(lambda: exchange.to_tokens(exchange.to_heads(query, key, value)[0]), seconds).median


def _step(
    name: str, transformer: Any, model: Model, inputs: dict[str, Tensor], compiled: bool, seconds: float
) -> Step:
    """Measure forwards with one and with more blocks of each kind, and compute the time of the whole step."""
    torch._dynamo.reset()
    lists = {path: transformer.get_submodule(path) for path, _, _ in model.blocks}
    times = {}

    def forward() -> None:
        transformer(**inputs, return_dict=False)

    gc.collect()
    with torch.inference_mode():
        base = _with_blocks(transformer, lists, dict.fromkeys(lists, 1), forward, seconds)
        times["1 of each"] = base
        cost = {}
        for path in lists:
            lengths = dict.fromkeys(lists, 1) | {path: BLOCKS}
            more = times[f"{BLOCKS} {path}"] = _with_blocks(transformer, lists, lengths, forward, seconds)
            cost[path] = (more.median - base.median) / (BLOCKS - 1)
        memory = _peak_memory(forward, inputs["hidden_states"].device)
    rest = base.median - sum(cost.values())
    whole = rest + sum(cost[path] * length for path, _, length in model.blocks)
    return Step(name, compiled, cost, rest, whole, times, memory)


def _with_blocks(
    transformer: Any, lists: dict[str, Any], lengths: dict[str, int], call: Callable[[], None], seconds: float
) -> Time:
    """Time a call while the transformer's module lists are cut to the given lengths."""
    try:
        for path, length in lengths.items():
            setattr(transformer, path, lists[path][:length])
        return measure(call, seconds)
    finally:
        for path, blocks in lists.items():
            setattr(transformer, path, blocks)


def _peak_memory(call: Callable[[], None], device: torch.device) -> float:
    """Measure the memory in GiB that a call allocates at its peak; 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def _dense_kernels(device: torch.device) -> list[str]:
    """List the dense kernels that are available on a device, besides diffusers' default."""
    if device.type != "cuda":
        return []
    kernels = ["cudnn"]
    with contextlib.suppress(ImportError):
        import flash_attn.cute.interface  # noqa: F401

        kernels.append("fa4")
    return kernels


@torch.library.custom_op("diffusers_draft_bench::dense", mutates_args=())
def _dense(query: Tensor, key: Tensor, value: Tensor, kernel: str) -> Tensor:
    """Run one dense kernel, or return a copy of `value` for `"no"`."""
    if kernel == "no":
        return value.clone()
    if kernel == "fa4":
        from flash_attn.cute.interface import _flash_attn_fwd

        return _flash_attn_fwd(query, key, value)[0]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return out.transpose(1, 2).contiguous()


@_dense.register_fake
def _(query, key, value, kernel):
    return query.new_empty(query.shape)


def _through(kernel: str) -> Hook:
    """Make a hook that attends with a dense kernel, or not at all; no mask is needed, as no text is padded."""

    def attend(call: AttentionCall) -> Tensor:
        return _dense(call.query, call.key, call.value, kernel)

    return attend


def predict(name: str, steps: list[Step], num_steps: int) -> dict[str, float]:
    """Predict the time of a whole run, with the best dense attention and with draft attention.

    Draft attention has the dense steps and layers of the model's family.

    Args:
        name: key of `MODELS`.
        steps: from `run`, draft attention last.
        num_steps: denoising steps of the run.

    Returns:
        Numbers by name; those in `_s` are seconds, those in `_ms` milliseconds.
    """
    model = MODELS[name]
    scheduler = model.scheduler()
    scheduler.set_timesteps(num_steps)
    with torch.device("meta"):
        family = family_of(model.build(**{key: 1 for _, key, _ in model.blocks}))
    assert family is not None, "every model here is of a known family"
    dense_steps = sum(t > family.dense_timestep for t in scheduler.timesteps.tolist())
    dense = [step for step in steps[:-1] if step.name not in NOT_DENSE]
    draft = steps[-1]
    best = min(dense, key=lambda step: step.step_ms)
    sparse_ms = draft.step_ms
    for path in family.dense_layers:
        kind = path.split(".")[0]
        sparse_ms += best.block_ms[kind] - draft.block_ms[kind]
    draft_ms = dense_steps * best.step_ms + (num_steps - dense_steps) * sparse_ms
    layers = sum(length for _, _, length in model.blocks)
    alone = [step.step_ms / draft.step_ms for step in steps if step.name == ONE_GPU]
    over_gpus = (
        {"gpu_speedup": alone[0], "exchange_share": layers * draft.exchange_ms / draft.step_ms} if alone else {}
    )
    return over_gpus | {
        "steps": num_steps,
        "dense_steps": dense_steps,
        "dense_s": num_steps * model.forwards * best.step_ms / 1e3,
        "draft_s": model.forwards * draft_ms / 1e3,
        "sparse_step_ms": sparse_ms,
        "best_dense_step_ms": best.step_ms,
        "step_speedup": best.step_ms / sparse_ms,
        "run_speedup": num_steps * best.step_ms / draft_ms,
    }
