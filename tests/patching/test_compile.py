import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import models
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from models import TINY, Loop, attention_replaced, error, hunyuan_video_inputs, wan_inputs
from paper import enable_draft_attention
from torch import Tensor
from torch._dynamo.utils import counters

import diffusers_draft
from diffusers_draft import disable_draft_attention
from diffusers_draft.attention.ops import Attended
from diffusers_draft.patching import dispatch
from diffusers_draft.patching.report import TransformerReport

GRIDS = [(3, 17, 13), (5, 20, 13), (5, 13, 20)]
"""Resolutions after the first one: as many tokens, more of them, as many again."""


@pytest.fixture(autouse=True)
def no_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()
    counters.clear()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def compile_regionally(transformer: Any, **options: Any) -> Any:
    transformer.compile_repeated_blocks(fullgraph=True, **options)
    return transformer


def compile_in_place(transformer: Any, **options: Any) -> Any:
    transformer.compile(fullgraph=True, **options)
    return transformer


def compile_around(transformer: Any, **options: Any) -> Any:
    return torch.compile(transformer, fullgraph=True, **options)


WAYS: dict[str, Callable[..., Any]] = {
    "regional": compile_regionally,
    "in place": compile_in_place,
    "around": compile_around,
}


def hunyuan_video() -> Any:
    return models.hunyuan_video(num_layers=1, num_single_layers=1)


MODELS: dict[str, tuple[Callable[[], Any], Callable[..., models.Inputs]]] = {
    "wan": (functools.partial(models.wan, num_layers=2), wan_inputs),
    "hunyuan_video": (hunyuan_video, hunyuan_video_inputs),
}
DENSE_LAYERS: dict[str, tuple[int, ...]] = {"wan": (0,), "hunyuan_video": ()}


def denoise(scheduler: Any, transformer: Any, inputs: models.Inputs) -> Iterator[Tensor]:
    """The outputs of all steps of a run."""
    for timestep in scheduler.timesteps:
        yield transformer(**inputs | {"timestep": torch.full_like(inputs["timestep"], float(timestep))}).sample
        scheduler.step(torch.zeros(1), timestep, torch.zeros(1))


def loop_of_eight_steps(transformer: Any) -> Loop:
    """The first three steps of Wan and the first two of HunyuanVideo are dense."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(8)
    scheduler.set_begin_index(0)
    return Loop(scheduler, transformer=transformer)


@functools.cache
def stock_graphs(name: str, way: str) -> list[int]:
    """Graphs of the stock model after its first forward and after each other resolution."""
    make, inputs = MODELS[name]
    transformer = WAYS[way](make(), backend="eager")
    counted = []
    for grid in (models.RAGGED, *GRIDS):
        transformer(**inputs(2, grid))
        counted.append(graphs())
    torch._dynamo.reset()
    counters.clear()
    return counted


@pytest.mark.parametrize(
    ("name", "way", "order"),
    [
        ("wan", "regional", "before"),
        ("wan", "regional", "after"),
        ("wan", "in place", "before"),
        ("wan", "in place", "after"),
        ("wan", "around", "before"),
        ("wan", "around", "after"),
        ("hunyuan_video", "regional", "after"),
        ("hunyuan_video", "in place", "before"),
    ],
)
def test_graphs(name: str, way: str, order: str) -> None:
    """One more for the switch from dense to sparse, none for steps, and as many as stock for a resolution."""
    stock = stock_graphs(name, "in place" if way == "around" else way)
    make, inputs = MODELS[name]
    settings = dict(sparsity=0.7, dense_layers=DENSE_LAYERS[name])
    eager = make()
    expected = loop_of_eight_steps(eager)
    enable_draft_attention(expected, **settings)
    outputs = list(denoise(expected.scheduler, eager, inputs(2)))

    transformer = make()
    loop = loop_of_eight_steps(transformer)
    if order == "before":
        handle = enable_draft_attention(loop, **settings)
    loop.components["transformer"] = compiled = WAYS[way](transformer, backend="eager")
    if order == "after":
        handle = enable_draft_attention(loop, **settings)

    counted = []
    for output, right in zip(denoise(loop.scheduler, compiled, inputs(2)), outputs, strict=True):
        assert error(output, right) < models.FLOAT32_ERROR
        counted.append(graphs())
    report = handle.report().transformers[0]
    dense = report.steps["dense"]
    assert report.steps == {"dense": dense, "sparse": 8 - dense}
    assert error(outputs[-1], outputs[0]) > 1e-2

    block_types = {"wan": 1, "hunyuan_video": 2}[name]
    types_with_dense_layers = len(DENSE_LAYERS[name])
    if way == "regional":
        first = stock[0] + types_with_dense_layers
        switch, of_resolution = block_types, types_with_dense_layers
    else:
        first, switch, of_resolution = stock[0], 1, 0
    assert counted == [first] * dense + [first + switch] * (8 - dense)

    for grid, before, after in zip(GRIDS, stock, stock[1:], strict=False):
        already = graphs()
        compiled(**inputs(2, grid))
        assert graphs() - already <= (after - before + of_resolution if after > before else 0)
        assert handle.report().transformers[0].grid == grid


def run_corrected(name: str, way: str, **options: Any) -> tuple[list[int], TransformerReport]:
    """Graphs after each of eight steps with correction, whose outputs equal eager ones, and the report."""
    torch._dynamo.reset()
    counters.clear()
    make, inputs = MODELS[name]
    eager, transformer = make(), make()
    loops = [loop_of_eight_steps(model) for model in (eager, transformer)]
    handles = [diffusers_draft.enable_draft_attention(loop, **options) for loop in loops]
    outputs = list(denoise(loops[0].scheduler, eager, inputs(2)))
    compiled = WAYS[way](transformer, backend="eager")
    counted = []
    for output, right in zip(denoise(loops[1].scheduler, compiled, inputs(2)), outputs, strict=True):
        assert error(output, right) < 5 * models.FLOAT32_ERROR
        counted.append(graphs())
    reports = [handle.report().transformers[0] for handle in handles]
    assert reports[0].steps == reports[1].steps == {"dense": 0, "sparse": 8}
    assert [forward.density for forward in reports[0].run] == [forward.density for forward in reports[1].run]
    return counted, reports[1]


@pytest.mark.parametrize("way", ["regional", "in place"])
@pytest.mark.parametrize("name", MODELS)
def test_a_falling_schedule_compiles_nothing_more(name: str, way: str) -> None:
    """Nor do other rows in every step: one graph for each kind of block, all in the first step."""
    stock = stock_graphs(name, way)
    constant, flat = run_corrected(name, way, sparsity=0.7, schedule="constant")
    falling, report = run_corrected(name, way, sparsity=0.7)
    assert falling == constant == [stock[0]] * 8
    asked = [forward.asked for forward in report.run]
    assert len(set(asked)) == 8 and len({forward.asked for forward in flat.run}) == 1
    assert [forward.step for forward in report.run] == list(range(8))
    assert len({forward.density for forward in report.run}) > 1
    assert report.error is not None and report.error.after < report.error.before


@pytest.mark.parametrize("way", ["regional", "in place"])
def test_densities_that_follow_errors_compile_nothing_more(way: str) -> None:
    constant, _ = run_corrected("wan", way, sparsity=0.7, schedule="constant", tile=(1, 4, 4), probes=16)
    graphs_of_each, report = run_corrected("wan", way, max_error=0.05, tile=(1, 4, 4), probes=16)
    assert graphs_of_each == constant
    assert len({forward.asked for forward in report.run}) == 8


def test_layers_share_their_graph() -> None:
    """Twelve layers need the graphs of two: a dense one, and a patched one before and after the switch."""
    transformer = models.wan(num_layers=12)
    loop = loop_of_eight_steps(transformer)
    enable_draft_attention(loop, dense_layers=(0, 5))
    compile_regionally(transformer, backend="eager")
    for _ in denoise(loop.scheduler, transformer, wan_inputs()):
        pass
    assert graphs() == 3


ROUTED = [
    "wan",
    "wan_vace",
    "wan_animate",
    "hunyuan_video",
    "LTXVideoTransformer3DModel",
    "CogVideoXTransformer3DModel",  # its processor calls F.scaled_dot_product_attention
    "HunyuanVideo15Transformer3DModel",  # its processor is written out
    "HeliosTransformer3DModel",  # history in front
    "MotifVideoTransformer3DModel",  # two forms of sequence
]


@pytest.mark.parametrize("name", [name for name in ROUTED if name in TINY])
def test_compiled_layers_are_routed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The marker replaces the result, so that an output that shows it went through draft attention."""
    tiny = TINY[name]
    transformer, inputs = tiny.build(), tiny.inputs(2)
    chosen = tuple(path for path in tiny.layers if path not in tiny.dense_layers)
    with attention_replaced(transformer, chosen, lambda query, key, value: torch.zeros_like(query)):
        expected = transformer(**inputs).sample

    def marked(*arguments: Any) -> Attended:
        found = attend(*arguments)
        return Attended(torch.zeros_like(found.out), found.pairs, found.squares, found.facts)

    attend = dispatch.attend
    unmarked = transformer(**inputs).sample
    monkeypatch.setattr(dispatch, "attend", marked)
    handle = enable_draft_attention(transformer)
    way = "regional" if transformer._repeated_blocks else "in place"
    WAYS[way](transformer, backend="eager")
    routed = transformer(**inputs).sample
    assert error(routed, unmarked) > 1e-2
    assert error(routed, expected) < models.FLOAT32_ERROR
    densities = handle.report().transformers[0].densities
    assert tuple(densities) == chosen
    assert None not in densities.values()


@pytest.mark.parametrize(
    ("name", "way", "timesteps"), [("wan", "regional", (990, 500)), ("hunyuan_video", "in place", (500,))]
)
def test_inductor_equals_eager(name: str, way: str, timesteps: tuple[int, ...]) -> None:
    make, inputs = MODELS[name]
    transformer, eager = make(), make()
    handles = [enable_draft_attention(model, 0.7, dense_layers=DENSE_LAYERS[name]) for model in (transformer, eager)]
    compiled = WAYS[way](transformer)
    for timestep in timesteps:
        arguments = inputs(2, timestep=timestep)
        assert error(compiled(**arguments).sample, eager(**arguments).sample) < 1e-5
    reports = [handle.report().transformers[0] for handle in handles]
    assert reports[0] == reports[1]
    assert reports[0].forwards == {"dense": len(timesteps) - 1, "sparse": 1}


@pytest.mark.parametrize("way", ["regional", "in place"])
def test_compiled_model_follows_every_change(way: str) -> None:
    transformer, eager = models.wan(num_layers=2), models.wan(num_layers=2)
    WAYS[way](transformer, backend="eager")
    inputs = wan_inputs()
    stock = eager(**inputs).sample
    assert error(transformer(**inputs).sample, stock) < models.FLOAT32_ERROR
    for settings in (dict(sparsity=0.9), dict(sparsity=0.4, dense_layers=()), dict(sparsity=0.9, budget="head")):
        for model in (transformer, eager):
            enable_draft_attention(model, **settings)
        sparse = eager(**inputs).sample
        assert error(sparse, stock) > 1e-2
        assert error(transformer(**inputs).sample, sparse) < models.FLOAT32_ERROR
    disable_draft_attention(transformer)
    before = graphs()
    assert error(transformer(**inputs).sample, stock) < models.FLOAT32_ERROR
    assert graphs() == before


def test_compiling_after_failed_new_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    transformer, inputs = models.wan(num_layers=2), wan_inputs()
    enable_draft_attention(transformer)
    sparse = transformer(**inputs).sample

    def refuse(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.undo()
        raise OSError("no hooks today")

    monkeypatch.setattr(transformer, "register_forward_pre_hook", refuse, raising=False)
    with pytest.raises(OSError, match="no hooks today"):
        enable_draft_attention(transformer, 0.5)
    compile_regionally(transformer, backend="eager")
    assert error(transformer(**inputs).sample, sparse) < models.FLOAT32_ERROR


def test_mask_under_compile_is_counted() -> None:
    transformer, inputs = models.wan(num_layers=2), wan_inputs()
    mask = torch.ones(663, 663, dtype=torch.bool).tril()[None, None]

    def pass_mask(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*args[:2], mask, *args[3:])

    transformer.blocks[1].attn1.register_forward_pre_hook(pass_mask)
    stock = transformer(**inputs).sample
    handle = enable_draft_attention(transformer)
    compile_in_place(transformer, backend="eager")
    for _ in range(2):
        assert error(transformer(**inputs).sample, stock) < models.FLOAT32_ERROR
    assert handle.report().transformers[0].dense_calls == {"step": 0, "layer": 2, "mask": 2, "replacement": 0}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_backward_under_compile_is_refused(backend: str) -> None:
    """By the time it is traced, which with AOT is before the first output; forwards without gradients go on."""
    transformer, inputs = models.wan(num_layers=1), wan_inputs()
    diffusers_draft.enable_draft_attention(transformer, 0.5)
    compile_in_place(transformer, backend=backend)
    with torch.enable_grad(), pytest.raises(Exception, match=r"no backward under torch\.compile.*torch\.no_grad\(\)"):
        transformer(**inputs).sample.sum().backward()
    assert transformer(**inputs).sample.isfinite().all()


MANY: list[dict[str, Any]] = [
    dict(sparsity=0.3 + number / 20, budget=budget, tile=tile, backend=backend)
    for number, (budget, tile, backend) in enumerate(
        itertools.product(("row", "head"), ((8, 16), (2, 8, 8), (4, 8)), ("torch", "reference"))
    )
]


@pytest.mark.parametrize("way", ["regional", "in place"])
@pytest.mark.parametrize("name", MODELS)
def test_enabling_again_compiles_nothing(name: str, way: str) -> None:
    """With and without disabling in between, nested and in turn, at three resolutions: dense and sparse once each."""
    stock = stock_graphs(name, way)
    make, inputs = MODELS[name]
    transformer, eager = make(), make()
    compiled = WAYS[way](transformer, backend="eager")
    grids = (models.RAGGED, *GRIDS)
    options = dict(dense_layers=(), dense_timestep=700)

    def check(settings: dict[str, Any], grid: models.Grid) -> None:
        with enable_draft_attention(eager, **settings, **options):
            expected = eager(**inputs(2, grid, timestep=500)).sample
        assert error(compiled(**inputs(2, grid, timestep=500)).sample, expected) < models.FLOAT32_ERROR

    for timestep in (990, 500):  # a dense and a sparse step at all resolutions
        with enable_draft_attention(transformer, 0.7, **options):
            for grid in grids:
                compiled(**inputs(2, grid, timestep=timestep))
    for grid in grids:
        compiled(**inputs(2, grid))  # stock
    before = graphs()
    for number, one in enumerate(MANY):
        handle = enable_draft_attention(transformer, **one, **options)
        check(one, grids[number % len(grids)])
        if number % 3 == 0:
            handle.disable()
        elif number % 3 == 1:
            with enable_draft_attention(transformer, 0.2, **options):
                check(dict(sparsity=0.2), models.RAGGED)
    assert graphs() == before
    # As many as stock for sparse layers, and for each kind of block one more for dense steps and one for stock.
    kinds = {"wan": 1, "hunyuan_video": 2}[name] if way == "regional" else 1
    # Torch 2.8 makes a graph of shapes that vary twice where an argument is None, as in a block of Wan.
    twice = torch.__version__ < "2.9" and (name, way) == ("wan", "regional")
    assert before == stock[-1] + 2 * kinds * (2 if twice else 1)
