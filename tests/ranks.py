"""What the ranks of `launch.py` run, and what a single process runs to compare."""

import copy
import datetime
import functools
import io
import itertools
import math
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import diffusers.hooks.context_parallel
import models
import torch
import torch.distributed as dist
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import (
    ContextParallelConfig,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoTransformer3DModel,
    WanTransformer3DModel,
)
from models import TINY, Grid, build
from paper import enable_draft_attention
from torch import Tensor

import diffusers_draft
from diffusers_draft import enable_parallelism
from diffusers_draft.attention.ops import Attended
from diffusers_draft.attention.ranks import operators as ulysses_ops
from diffusers_draft.attention.ranks import transfer
from diffusers_draft.attention.ranks.exchange import Exchange
from diffusers_draft.attention.steps import plain
from diffusers_draft.cli import main
from diffusers_draft.config import DraftConfig
from diffusers_draft.patching.report import ForwardReport
from diffusers_draft.tools.bench import models as bench_models
from diffusers_draft.tools.bench import predict as bench_predict
from diffusers_draft.tools.bench import step as bench_step
from diffusers_draft.tools.bench.shapes import Shape
from diffusers_draft.tools.evaluation.selection import selecting


def even_text(batch: int, grid: Grid) -> models.Inputs:
    """Older diffusers' own plan splits the text as well."""
    return models.wan_inputs(batch, grid) | {"encoder_hidden_states": models.random(batch, 8, 8)}


FOUR_HEADS = dict(num_attention_heads=4, attention_head_dim=16)
EIGHT_HEADS = dict(num_attention_heads=8, attention_head_dim=16)
BUILD: dict[str, Callable[[], Any]] = {
    "wan 4 heads": lambda: build(WanTransformer3DModel, models._WAN | FOUR_HEADS),
    "hunyuan_video 4 heads": lambda: build(HunyuanVideoTransformer3DModel, models._HUNYUAN_VIDEO | FOUR_HEADS),
    "wan 8 heads": lambda: build(WanTransformer3DModel, models._WAN | EIGHT_HEADS),
    "wan 12 heads": lambda: build(WanTransformer3DModel, models._WAN | EIGHT_HEADS | dict(num_attention_heads=12)),
    "hunyuan_video 8 heads": lambda: build(HunyuanVideoTransformer3DModel, models._HUNYUAN_VIDEO | EIGHT_HEADS),
    **{name: tiny.build for name, tiny in TINY.items()},
}
INPUTS: dict[str, Callable[..., models.Inputs]] = {
    "wan 4 heads": even_text,
    "hunyuan_video 4 heads": models.hunyuan_video_inputs,
    "wan 8 heads": even_text,
    "wan 12 heads": even_text,
    "hunyuan_video 8 heads": models.hunyuan_video_inputs,
    **{name: tiny.inputs for name, tiny in TINY.items()},
}
SPARSE = dict(sparsity=0.8, dense_timestep=1000)
HALF = SPARSE | dict(sparsity=0.5)
Outcome = tuple[Tensor, list[Tensor], str]
"""The output, `(B, H, N, N)` kept blocks of each sparse call, and the report."""


def in_group(rank: int, size: int, store: Path, function: str, *args: Any, **options: Any) -> Any:
    torch.set_num_threads(1)
    if function == "command":
        return command(rank, size, store, *args)
    seconds = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=seconds)
    try:
        return globals()[function](*args, **options)
    finally:
        dist.barrier()  # or a rank that fails at once is gone before the others have met it
        dist.destroy_process_group()


def split(model: Any, how: str = "ours", **config: Any) -> None:
    config = config or {"ulysses_degree": dist.get_world_size()}
    if how == "ours":
        return enable_parallelism(model, config=ContextParallelConfig(**config))
    # Without an accelerator diffusers divides by the number of devices.
    with mock.patch.object(torch.accelerator, "device_count", return_value=1):
        model.enable_parallelism(config=ContextParallelConfig(**config), cp_plan=model._cp_plan or {})


def outcome(
    name: str,
    batch: int,
    grid: Grid,
    draft: dict[str, Any] | None,
    split_when: str = "",
    how: str = "ours",
    config: dict[str, int] | None = None,
) -> Outcome:
    """One forward, with draft attention or without, of a model that is split before, after or not at all."""
    model = BUILD[name]()
    kept: list[Tensor] = []
    if split_when == "before":
        split(model, how, **config or {})
    handle = None if draft is None else enable_draft_attention(model, **draft)
    if split_when == "after":
        split(model, how, **config or {})
    watched = mock.patch.object(plain, "select", functools.partial(_select, plain.select, kept))
    with watched, torch.no_grad():
        output = model(**INPUTS[name](batch, grid), return_dict=False)[0]  # as pipelines call it
    return output, kept, str(handle.report()) if handle else ""


def _select(select: Callable[..., Any], kept: list[Tensor], *args: Any) -> Any:
    mask = select(*args)
    kept.append(mask.to_dense())
    return mask


def a_run(
    name: str, batch: int, grid: Grid, splitting: bool, runs: int = 1, **draft: Any
) -> tuple[list[Tensor], list[Tensor], list[ForwardReport]]:
    """The outputs of runs of six steps, the blocks that each sparse call kept, and the report of the last run."""
    model = BUILD[name]()
    loop = models.Loop(FlowMatchEulerDiscreteScheduler(), transformer=model)
    handle = diffusers_draft.enable_draft_attention(loop, tile=(1, 4, 4), probes=16, **draft)
    if splitting:
        split(model)
    outputs, kept = [], []
    watched = mock.patch.object(plain, "select", functools.partial(_select, plain.select, kept))
    for _ in range(runs):
        loop.scheduler.set_timesteps(6)
        for timestep in loop.scheduler.timesteps:
            inputs = INPUTS[name](batch, grid) | {"timestep": timestep.expand(batch)}
            with watched, torch.no_grad():
                outputs.append(model(**inputs, return_dict=False)[0])
            loop.scheduler.step(torch.zeros(1), timestep, torch.zeros(1))
    return outputs, kept, list(handle.report().transformers[0].run)


def disabled_again(name: str, grid: Grid) -> Outcome:
    """A dense forward after draft attention was enabled, split, disabled, enabled and disabled."""
    model = BUILD[name]()
    handle = enable_draft_attention(model)
    split(model)
    handle.disable()
    with enable_draft_attention(model, 0.8), torch.no_grad():
        model(**INPUTS[name](2, grid), return_dict=False)
    with torch.no_grad():
        return model(**INPUTS[name](2, grid), return_dict=False)[0], [], ""


def baseline(name: str, grid: Grid, how: str = "") -> Outcome:
    """A forward in which a static window chooses the blocks in draft attention's place."""
    model = BUILD[name]()
    if how:
        split(model, how)
    with enable_draft_attention(model, **HALF) as handle, handle._watched(selecting("local", 0)), torch.no_grad():
        return model(**INPUTS[name](2, grid), return_dict=False)[0], [], ""


def causal(name: str, grid: Grid) -> dict[str, int]:
    """The report's dense calls of a model whose mask over pairs of tokens draft attention cannot honour."""
    model, inputs = BUILD[name](), INPUTS[name](1, grid)
    model.register_to_config(num_frame_per_block=2)
    with torch.no_grad():
        expected = model(**inputs, return_dict=False)[0]
        split(model)
        handle = enable_draft_attention(model)
        assert models.error(model(**inputs, return_dict=False)[0], expected) < models.FLOAT32_ERROR
    return handle.report().transformers[0].dense_calls


def exchanged(whole: Tensor, behind: int, groups: list[list[int]] | None = None) -> tuple[list[Tensor], Tensor]:
    """What a rank gets of `(3, B, S, H, D)`, and its tokens of the query that comes back; all of it strided.

    Each of several groups has tensors of its own: its number is added.
    """
    group: Any = dist.group.WORLD
    for number, made in enumerate(map(dist.new_group, groups or [])):
        if dist.get_rank() in groups[number]:  # type: ignore[index]
            group, whole = made, whole + number
    video = whole.shape[2] - behind
    query, key, value = _of_rank(group, whole, video).transpose(2, 3).contiguous().transpose(2, 3)
    exchange = Exchange(group, video, behind > 0)
    heads = exchange.to_heads(query, key, value)
    return heads, exchange.to_tokens(heads[0].transpose(1, 2).contiguous().transpose(1, 2))


def _of_rank(group: Any, whole: Tensor, video: int) -> Tensor:
    """This rank's tokens: its share of the video, and all that are behind."""
    share = video // group.size()
    return whole[:, :, [*range(group.rank() * share, (group.rank() + 1) * share), *range(video, whole.shape[2])]]


def exchanged_with_priority(whole: Tensor) -> tuple[list[Tensor], Tensor, list[dict[str, Any]]]:
    """An exchange, and the groups that are made for it, where the group at hand seems to be one of NCCL."""
    made = []
    new_group = dist.new_group

    def noted(**options: Any) -> Any:
        made.append(options)
        return new_group()

    with (
        mock.patch.object(dist, "get_backend_config", return_value="cpu:gloo,cuda:nccl"),
        mock.patch.object(dist, "ProcessGroupNCCL", SimpleNamespace(Options=dict), create=True),
        mock.patch.object(dist, "new_group", noted),
    ):
        return *exchanged(whole, 5), made


def attended(
    whole: Tensor, grid: Grid, kv_len: Tensor | None, fitting: float = math.inf
) -> tuple[Any, Any, list[str]]:
    """A rank's draft attention of `(3, B, S, H, D)` and computed pairs, or why there are none, and the calls in turn.

    There is memory to pack `fitting` tensors that are to be sent.
    """
    group: Any = dist.group.WORLD
    video = math.prod(grid)
    calls = []
    waited = transfer.Underway.wait

    def noted(function: str) -> Any:
        original = getattr(ulysses_ops, function)
        return mock.patch.object(ulysses_ops, function, lambda *args: calls.append(function) or original(*args))

    exchange = Exchange(group, video, whole.shape[2] > video)
    geometry, config = torch.tensor([*grid, 0]), DraftConfig(sparsity=0.7, tile=(2, 4, 4))
    wait = mock.patch.object(transfer.Underway, "wait", lambda part: calls.append("wait") or waited(part))
    pack = mock.patch.object(
        transfer, "_packed", functools.partial(_packed, transfer._packed, itertools.count(), fitting)
    )
    with noted("start_to_heads"), noted("attend_now"), noted("start_to_tokens"), wait, pack:
        try:
            out, pairs, *_ = exchange.attend(*_of_rank(group, whole, video), geometry, kv_len, *how(config))
        except (ValueError, torch.OutOfMemoryError) as error:
            return str(error), None, calls
    return out, pairs, calls


def how(config: DraftConfig) -> tuple[Tensor, Tensor]:
    """What operators take of a config."""
    return torch.tensor([config.sparsity, 3], dtype=torch.float64), config.method.to_tensor()


def _packed(pack: Callable[[Tensor], Tensor], packed: Iterator[int], fitting: float, tensor: Tensor) -> Tensor:
    if next(packed) >= fitting:
        raise torch.OutOfMemoryError(f"no memory for {tuple(tensor.shape)}")
    return pack(tensor)


def operators() -> dict[str, str]:
    """What torch's own checks say of the operators: schema, fake results and tracing."""
    name, sizes = dist.group.WORLD.group_name, [5, 5 + 3]  # type: ignore[union-attr]
    tensors = [torch.randn(2, 5 + 3, 4, 8) for _ in range(3)]
    calls: dict[str, tuple[Any, ...]] = {
        "to_heads": (*tensors, name, sizes),
        "to_tokens": (torch.randn(2, 2 * 5 + 3, 2, 8), name, 2, 5),
        "attend_over_ranks": (
            *tensors,
            name,
            sizes,
            torch.tensor([1, 2, 5, 0]),
            None,
            *how(DraftConfig(sparsity=0.5, tile=(4, 4), backend="torch")),
            None,
        ),
    }
    utils = ("test_schema", "test_faketensor")
    found = {op: torch.library.opcheck(getattr(ulysses_ops, op), args, test_utils=utils) for op, args in calls.items()}
    return {op: " ".join(set(results.values())) for op, results in found.items()}


def split_twice() -> str:
    model = BUILD["wan"]()
    split(model)
    try:
        split(model)
    except RuntimeError as error:
        return str(error)
    return "no error"


def with_gradients() -> None:
    model = BUILD["wan"]()
    split(model)
    enable_draft_attention(model)
    model(**INPUTS["wan"](1, (4, 13, 17)), return_dict=False)


def compiled(name: str, grids: list[Grid]) -> list[Tensor]:
    """Draft attention in compiled blocks, over many resolutions."""
    torch.compiler.reset()
    model = BUILD[name]()
    split(model)
    enable_draft_attention(model, 0.8)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        return [model(**INPUTS[name](2, grid), return_dict=False)[0] for grid in grids]


def compiled_whole(name: str, grid: Grid) -> Tensor:
    """Draft attention in a model that is compiled as a whole."""
    torch.compiler.reset()
    model = BUILD[name]()
    split(model)
    enable_draft_attention(model, 0.8)
    with torch.no_grad():
        return torch.compile(model, fullgraph=True, backend="aot_eager")(**INPUTS[name](2, grid), return_dict=False)[0]


def offloaded_first(how: str) -> None:
    """Hooks of accelerate are put on, the model is split, and they are removed, as pipelines do after every call."""
    model = BUILD["wan"]()
    hooked = [model.rope, *model.blocks]
    for module in hooked:
        add_hook_to_module(module, ModelHook())
    split(model, how)
    enable_draft_attention(model)
    for module in hooked:
        remove_hook_from_module(module)
    with torch.no_grad():
        model(**even_text(1, (4, 13, 17)), return_dict=False)


def copied() -> None:
    model = BUILD["wan"]()
    split(model)
    copy.deepcopy(model)


def replaced() -> None:
    """Another processor in a layer of a split model."""
    model = BUILD["wan"]()
    stock = type(model.blocks[0].attn1.processor)
    split(model)
    model.blocks[1].attn1.processor = stock()
    with torch.no_grad():
        model(**INPUTS["wan"](1, (4, 13, 17)), return_dict=False)


def half_split() -> tuple[Outcome, str]:
    """The second of two transformers cannot be split: the first one is as it was, and both can be split later."""
    pipe = models.wan_pipeline(TINY["wan"].build(), transformer_2=TINY["wan"].build(), boundary_ratio=0.5)
    both = [pipe.transformer, pipe.transformer_2]
    handle = enable_draft_attention(pipe.transformer, **SPARSE)
    with torch.no_grad():
        alone = pipe.transformer(**INPUTS["wan"](1, (4, 13, 17)), return_dict=False)[0]
    apply, count = diffusers.hooks.context_parallel.apply_context_parallel, itertools.count()

    def failing(*args: Any) -> None:
        if next(count):
            raise MemoryError("no memory")
        apply(*args)

    with mock.patch("diffusers.hooks.context_parallel.apply_context_parallel", failing):
        try:
            split(pipe)
        except MemoryError as error:
            message = str(error)
    assert all(model._parallel_config is None for model in both)
    with torch.no_grad():
        assert torch.equal(pipe.transformer(**INPUTS["wan"](1, (4, 13, 17)), return_dict=False)[0], alone)
        split(pipe)
        together = pipe.transformer(**INPUTS["wan"](1, (4, 13, 17)), return_dict=False)[0]
    assert models.error(together, alone) < models.FLOAT32_ERROR
    return (together, [], str(handle.report())), message


def bench(spoiled: bool) -> tuple[list[bench_step.Step], list[str], dict[str, float]]:
    """The bench of a tiny Wan, which of its steps chose blocks, and its prediction; spoiled, heads are mixed up."""
    sizes = dict(num_attention_heads=4, attention_head_dim=16, ffn_dim=32, in_channels=4, out_channels=4, freq_dim=16)
    tiny = bench_models.Model(
        "tiny",
        (("blocks", "num_layers", 5),),
        lambda **layers: WanTransformer3DModel(**sizes, **layers),
        bench_models._wan_inputs(4),
        bench_models._flow_scheduler(3.0),
        1,
        0.8,
        bench_models._wan_pipeline(),
        bench_models._wan_arguments(4),
    )
    attend = Exchange.attend
    kept: list[Tensor] = []
    steps, sparse = [], []

    def spoil(exchange: Exchange, *args: Any) -> Attended:
        found = attend(exchange, *args)
        return found._replace(out=found.out.flip(2)) if spoiled else found

    with (
        mock.patch.dict(bench_models.MODELS, {"tiny": tiny}),
        mock.patch.dict(bench_step.SHAPES, {"tiny": Shape((4, 13, 17), 4, 16)}),
        mock.patch.object(Exchange, "attend", spoil),
        mock.patch.object(plain, "select", functools.partial(_select, plain.select, kept)),
    ):
        config = DraftConfig(backend="torch", tile=(2, 4, 4), budget="head")
        densities = bench_predict.densities_to_measure("tiny", config, 10)
        options: dict[str, Any] = dict(compiled=False, default=True, seconds=0.01, device=torch.device("cpu"))
        for step in bench_step.run("tiny", config, densities, split=split, **options):
            steps.append(step)
            sparse += [step.name] if kept else []
            kept.clear()
        return steps, sparse, bench_predict.predict("tiny", config, steps, 10)


def command(rank: int, size: int, store: Path, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command as `torchrun` starts it."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port(store)), "CUDA_VISIBLE_DEVICES": ""}
    numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    out, err = io.StringIO(), io.StringIO()
    with mock.patch.dict(os.environ, place | numbers), redirect_stdout(out), redirect_stderr(err):
        try:
            code = main(list(arguments))
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    return code, out.getvalue(), err.getvalue()


def free_port(store: Path) -> int:
    """A port that is free, the same for all who ask with one file."""
    shared = dist.FileStore(str(store), -1)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(shared.compare_set("port", "", str(found.getsockname()[1])))
