"""Benchmark of one denoising step of a real transformer at its real width, dense and with draft attention.

Weights are random and only a few blocks are built. The time of a block is the difference between forwards with more
and with fewer blocks of its kind; the time of the whole step is the sum over all blocks.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...api import enable_draft_attention
from ...config import DraftConfig
from ...patching.dispatch import exchange_of
from ...patching.forward import AttentionCall
from .dense import NO_ATTENTION, dense_kernels, through
from .measure import Time, measure
from .models import MODELS, Model
from .shapes import SHAPES

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
        density: share of the pairs of video blocks that draft attention computed; None for dense attention.
    """

    name: str
    compiled: bool
    block_ms: dict[str, float]
    rest_ms: float
    step_ms: float
    times: dict[str, Time]
    memory_gib: float
    exchange_ms: float = 0.0
    density: float | None = None


def run(
    name: str,
    config: DraftConfig,
    densities: Sequence[float],
    *,
    compiled: bool,
    default: bool,
    device: torch.device,
    seconds: float,
    split: Callable[[nn.Module], None] | None = None,
) -> Iterator[Step]:
    """Measure a step without attention, with dense kernels, and with draft attention.

    Args:
        name: key of `MODELS`.
        config: how draft attention is set; how dense it is and where is for `densities` to say.
        densities: those to measure; the last one is measured over several GPUs, if there are.
        compiled: whether to compile the repeated blocks.
        default: whether to measure the attention that diffusers chooses, too, often the slowest by far.
        device: the device to run on.
        seconds: least time to measure each forward.
        split: splits a transformer over GPUs. If given, draft attention on one GPU is measured first and the output
            of several GPUs is checked against it.

    Raises:
        RuntimeError: if the output of several GPUs differs from that of one.
    """
    model = MODELS[name]
    torch.manual_seed(0)  # so that all processes have the same model and inputs
    transformer = model.make(device, torch.bfloat16, BLOCKS)
    inputs = model.inputs(SHAPES[model.shape], device, torch.bfloat16)
    if compiled:
        transformer.compile_repeated_blocks(fullgraph=True)

    def draft(name: str = "") -> tuple[Step, Tensor]:
        *_, measured = draft_steps(transformer, model, inputs, config, densities[-1:], compiled, seconds)
        with enable_draft_attention(transformer, config=_at(config, densities[-1])) as handle:
            with torch.inference_mode():
                output = transformer(**inputs, return_dict=False)[0]
            print(handle.report())
        return replace(measured, name=name or measured.name), output

    expected = None
    if split:
        alone, expected = draft(ONE_GPU)
        yield alone
        split(transformer)
    if default:
        yield measure_step("diffusers default", transformer, model, inputs, compiled, seconds)
    for kernel in ("no", *dense_kernels(device)):
        yield dense_step(kernel, transformer, model, inputs, compiled, seconds)
    yield from draft_steps(transformer, model, inputs, config, densities[:-1], compiled, seconds)
    measured, output = draft()
    if expected is not None:
        _check_same(output, expected)
        measured = replace(measured, exchange_ms=_exchange_ms(transformer, inputs, seconds))
    yield measured


def dense_step(
    kernel: str, transformer: Any, model: Model, inputs: dict[str, Tensor], compiled: bool, seconds: float
) -> Step:
    """Measure a step with one of `dense.dense_kernels`, or `"no"` attention."""
    name = NO_ATTENTION if kernel == "no" else f"dense {kernel}"
    with enable_draft_attention(transformer, dense_layers=()) as handle, handle._watched(through(kernel)):
        return measure_step(name, transformer, model, inputs, compiled, seconds)


def draft_steps(
    transformer: Any,
    model: Model,
    inputs: dict[str, Tensor],
    config: DraftConfig,
    densities: Sequence[float],
    compiled: bool,
    seconds: float,
) -> Iterator[Step]:
    """Measure a step with all layers sparse, at each density."""
    torch._dynamo.reset()
    for density in densities:
        with enable_draft_attention(transformer, config=_at(config, density)):
            name = f"draft, density {density:.3g}"
            step = measure_step(name, transformer, model, inputs, compiled, seconds, reset=False)
        yield replace(step, density=density)


def _at(config: DraftConfig, density: float) -> DraftConfig:
    """Make all steps and layers of this density."""
    free: dict[str, Any] = {"dense_steps": 0, "dense_timestep": None, "dense_layers": ()}
    return replace(config, sparsity=max(0.0, 1 - density), schedule="constant", **free)


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


def measure_step(
    name: str,
    transformer: Any,
    model: Model,
    inputs: dict[str, Tensor],
    compiled: bool,
    seconds: float,
    reset: bool = True,
) -> Step:
    """Measure forwards with one and with more blocks of each kind, and compute the time of the whole step."""
    if reset:
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
