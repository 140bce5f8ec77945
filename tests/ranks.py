"""What the ranks of `launch.py` run, and what a single process runs to compare."""

import datetime
import functools
import io
import os
import socket
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import models
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, HunyuanVideoTransformer3DModel, WanTransformer3DModel
from models import TINY, Grid, build
from torch import Tensor

from diffusers_draft import enable_draft_attention, plain
from diffusers_draft.cli import main
from diffusers_draft.parallel import enable_parallelism


def even_text(batch: int, grid: Grid) -> models.Inputs:
    """Older diffusers' own plan splits the text as well."""
    return models.wan_inputs(batch, grid) | {"encoder_hidden_states": models.random(batch, 8, 8)}


FOUR_HEADS = dict(num_attention_heads=4, attention_head_dim=16)
BUILD: dict[str, Callable[[], Any]] = {
    "wan 4 heads": lambda: build(WanTransformer3DModel, models._WAN | FOUR_HEADS),
    "hunyuan_video 4 heads": lambda: build(HunyuanVideoTransformer3DModel, models._HUNYUAN_VIDEO | FOUR_HEADS),
    **{name: tiny.build for name, tiny in TINY.items()},
}
INPUTS: dict[str, Callable[..., models.Inputs]] = {
    "wan 4 heads": even_text,
    "hunyuan_video 4 heads": models.hunyuan_video_inputs,
    **{name: tiny.inputs for name, tiny in TINY.items()},
}
Outcome = tuple[Tensor, list[Tensor], str]
"""The output, `(B, H, N, N)` kept blocks of each sparse call, and the report."""


def in_group(rank: int, size: int, store: Path, function: str, args: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    if function == "command":
        return command(rank, size, store, *args)
    seconds = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=seconds)
    try:
        return globals()[function](*args)
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


def compiled(name: str, grid: Grid) -> Outcome:
    """Draft attention in compiled blocks."""
    model = BUILD[name]()
    split(model)
    enable_draft_attention(model, 0.8)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        return model(**INPUTS[name](2, grid), return_dict=False)[0], [], ""


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
