import gc
import math
import weakref
from typing import Any

import models
import pytest
import torch
from models import RAGGED, run_hunyuan_video, run_wan
from paper import PAPER, enable_draft_attention
from torch import Tensor

import diffusers_draft
from diffusers_draft import DraftConfig
from diffusers_draft.attention import kernels
from diffusers_draft.attention.block_mask import BlockMask
from diffusers_draft.attention.ops import Attended, attend
from diffusers_draft.patching import tally
from diffusers_draft.patching.clock import Moment
from diffusers_draft.patching.forward import AttentionCall
from diffusers_draft.patching.records import SparseCall
from diffusers_draft.patching.report import TransformerReport
from diffusers_draft.patching.schedule import SparseStep


def run(model: torch.nn.Module, inputs: models.Inputs) -> Tensor:
    with torch.no_grad():
        return model(**inputs).sample


def one(handle: Any) -> Any:
    (transformer,) = handle.report().transformers
    return transformer


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[BlockMask]:
    """What the backend gets in all sparse calls of a test."""
    return models.recorded_masks(monkeypatch)


def test_before_any_call() -> None:
    handle = enable_draft_attention(models.wan(), sparsity=0.75, budget="head")
    report = one(handle)
    assert report.component == "transformer"
    assert report.family == "Wan 2.1 and 2.2"
    assert report.config == handle.config == DraftConfig(sparsity=0.75, budget="head", **PAPER)
    assert report.attached
    assert report.backend is report.backend_reason is report.grid is report.blocks is report.density is None
    assert report.densities == {"blocks.1.attn1": None, "blocks.2.attn1": None}
    assert report.dense_layers == ("blocks.0.attn1",)
    assert report.steps == report.forwards == {"dense": 0, "sparse": 0}
    assert report.dense_calls == {"step": 0, "layer": 0, "mask": 0, "replacement": 0}
    assert str(handle.report()) == (
        "transformer: Wan 2.1 and 2.2, sparsity 0.75 paper, head budget, mass score\n"
        "  backend   not chosen yet\n"
        "  density   no sparse call yet\n"
        "  layers    2 sparse, 1 dense\n"
        "  steps     0 sparse, 0 dense\n"
        "  calls     0 sparse; dense: none"
    )


def test_after_a_run() -> None:
    pipe = models.wan_pipeline()
    handle = enable_draft_attention(pipe, sparsity=0.5)
    run_wan(pipe, steps=6)
    report = one(handle)
    assert [t > 925 for t in pipe.scheduler.timesteps.tolist()] == [True] * 2 + [False] * 4
    assert report.steps == {"dense": 2, "sparse": 4}
    assert report.forwards == {"dense": 4, "sparse": 8}
    assert report.dense_calls == {"step": 4 * 2, "layer": 12 * 1, "mask": 0, "replacement": 0}
    assert report.grid == RAGGED
    assert report.blocks == (6, 5)
    assert report.backend == "torch"
    assert "cpu" in report.backend_reason
    assert str(handle.report()) == (
        "transformer: Wan 2.1 and 2.2, sparsity 0.5 paper, row budget, mass score\n"
        f"  backend   torch ({report.backend_reason})\n"
        "  grid      (3, 13, 17) = 663 video tokens\n"
        "  blocks    6 of 128 tokens, 5 of them video\n"
        "  density   0.583 (forwards from 0.583 to 0.583; asked for 0.500)\n"
        "  layers    2 sparse, 1 dense\n"
        "  steps     4 sparse, 2 dense\n"
        "  calls     16 sparse; dense: 8 by step, 12 by layer"
    )


@pytest.mark.parametrize("budget", ["head", "row"])
@pytest.mark.parametrize("sparsity", [0, 0.3, 0.5, 0.9])
def test_density_without_text(sparsity: float, budget: str, masks: list[BlockMask]) -> None:
    """663 tokens: five video blocks and one anchor that holds the rest."""
    model = models.wan()
    handle = enable_draft_attention(model, sparsity=sparsity, budget=budget, dense_layers=(1,))
    run(model, models.wan_inputs(2))
    pairs = max(5, round((1 - sparsity) * 25)) if budget == "head" else 5 * max(1, round((1 - sparsity) * 5))
    expected = (pairs + 5 + 6) / 36
    assert one(handle).densities == {path: pytest.approx(expected) for path in ("blocks.0.attn1", "blocks.2.attn1")}
    assert one(handle).density == pytest.approx(expected)
    assert [mask.density().item() for mask in masks] == [pytest.approx(expected)] * 2


def test_density_counts_only_blocks_with_valid_text(masks: list[BlockMask]) -> None:
    """663 video and 300 text tokens: 5 video blocks and 3 anchors, of which the samples need 3 and 1 as keys."""
    model = models.hunyuan_video()
    handle = enable_draft_attention(model, sparsity=0.8)
    run(model, models.hunyuan_video_inputs(2, text=300, lengths=(300, 20)))
    pairs = max(5, round(0.2 * 25))
    computed = (pairs + 5 * 3 + 3 * 8) + (pairs + 5 * 1 + 3 * 6)
    assert one(handle).blocks == (8, 5)
    assert set(one(handle).densities) == {
        "transformer_blocks.2.attn",
        "single_transformer_blocks.0.attn",
        "single_transformer_blocks.1.attn",
    }
    assert list(one(handle).densities.values()) == [pytest.approx(computed / (8 * 8 + 8 * 6))] * 3
    assert one(handle).density == pytest.approx(torch.stack([mask.density() for mask in masks]).mean().item())


def test_every_sparse_call_reports_its_own_density(masks: list[BlockMask]) -> None:
    """The last sparse call speaks for a layer, whatever ran densely since."""
    model = models.hunyuan_video()
    handle = enable_draft_attention(model, sparsity=0.8)
    run(model, models.hunyuan_video_inputs(1, text=300, lengths=(20,)))
    before = one(handle)
    assert before.density == pytest.approx(masks[-1].density().item())
    run(model, models.hunyuan_video_inputs(1, text=300, lengths=(300,), timestep=990))
    assert one(handle).density == before.density


def test_forwards_of_other_sizes_and_lengths_are_read_together(
    masks: list[BlockMask], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three waits for the device however many forwards and layers there were: pairs, squares and lengths."""
    model = models.hunyuan_video()
    handle = diffusers_draft.enable_draft_attention(model, sparsity=0.5)
    squares: list[list[float]] = []

    def look(call: AttentionCall) -> Attended:
        found = attend(*call.arguments)
        squares.append(found.squares.tolist())
        return found

    with handle._watched(look):
        run(model, models.hunyuan_video_inputs(2, text=300, lengths=(300, 20), timestep=100))
        run(model, models.hunyuan_video_inputs(1, text=40, lengths=(9,), timestep=200))
        run(model, models.hunyuan_video_inputs(3, text=300, lengths=(20, 300, 20), timestep=300))
    reads: list[torch.Size] = []
    for name in ("tolist", "__int__", "item"):
        stock = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda tensor, stock=stock: reads.append(tensor.shape) or stock(tensor))
    report = one(handle)
    monkeypatch.undo()
    layers = 5
    assert len([shape for shape in reads if shape != (4,)]) == 3  # facts are on the CPU
    densities = [mask.density().item() for mask in masks]
    assert len(densities) == 3 * layers and len(set(densities)) == 3
    assert [forward.density for forward in report.run] == pytest.approx(densities[::layers])
    assert list(report.densities.values()) == pytest.approx(densities[-layers:])
    for layer, error in enumerate(report.errors.values()):
        of_layer = squares[layer::layers]
        assert error.before == pytest.approx(sum((before / whole) ** 0.5 for before, _, whole in of_layer) / 3)
        assert error.after == pytest.approx(sum((after / whole) ** 0.5 for _, after, whole in of_layer) / 3)


def test_the_latest_forwards_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"at most the last {tally.MOST_FORWARDS}" in str(TransformerReport.__doc__)
    monkeypatch.setattr(tally, "MOST_FORWARDS", 3)
    model = models.wan()
    handle = diffusers_draft.enable_draft_attention(model)
    for timestep in (900, 700, 500, 300, 100):
        run(model, models.wan_inputs(grid=(1, 16, 24), timestep=timestep))
    assert [forward.step for forward in one(handle).run] == [2, 3, 4]
    assert one(handle).forwards["sparse"] == 5


@pytest.mark.parametrize("broken", range(3))
def test_nan_is_the_worst_error(broken: int) -> None:
    """In one call of a layer: it shows in the layer, the forward and the run, and nowhere else."""
    model = models.wan()
    handle = diffusers_draft.enable_draft_attention(model, sparsity=0.5)
    calls: list[str] = []

    def look(call: AttentionCall) -> Attended:
        calls.append(call.path)
        found = attend(*call.arguments)
        return found._replace(squares=found.squares * torch.nan) if len(calls) == 1 + broken else found

    with handle._watched(look):
        run(model, models.wan_inputs())
        run(model, models.wan_inputs())
    report, path = one(handle), f"blocks.{broken}.attn1"
    assert [math.isnan(error.after) for error in report.errors.values()] == [layer == broken for layer in range(3)]
    assert [math.isnan(forward.error.before) for forward in report.run] == [True, False]
    assert math.isnan(report.error.before) and math.isnan(report.error.after)
    assert report.worst_layer == path
    assert f"error     nan before correction, nan after; worst layer {path}: nan, nan" in str(report)


def test_blocks_are_those_of_the_last_sparse_call() -> None:
    model = models.wan()
    handle = enable_draft_attention(model)
    run(model, models.wan_inputs())
    run(model, models.wan_inputs(grid=(3, 20, 20), timestep=990))
    assert one(handle).grid == (3, 20, 20)
    assert one(handle).blocks == (6, 5)
    run(model, models.wan_inputs(grid=(3, 20, 20)))
    assert one(handle).blocks == (10, 9)


def test_tile_sets_the_block() -> None:
    model = models.wan()
    handle = enable_draft_attention(model, tile=(4, 8), sparsity=0.5)
    run(model, models.wan_inputs())
    assert one(handle).blocks == (21, 20)
    assert "21 of 32 tokens, 20 of them video" in str(handle.report())


def test_all_layers_dense() -> None:
    model = models.wan()
    handle = enable_draft_attention(model, dense_layers=range(3))
    run(model, models.wan_inputs())
    report = one(handle)
    assert report.densities == {}
    assert report.density is report.backend is None
    assert report.forwards == {"dense": 0, "sparse": 1}
    assert report.dense_calls == {"step": 0, "layer": 3, "mask": 0, "replacement": 0}
    assert "3 by layer" in str(handle.report())


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_backend_asked_for(backend: str) -> None:
    model = models.wan()
    handle = enable_draft_attention(model, backend=backend)
    run(model, models.wan_inputs())
    assert (one(handle).backend, one(handle).backend_reason) == (backend, "asked for")


def test_backend_of_calls_under_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report asks for the same choice as the calls; one that needs gradients has fewer backends."""
    monkeypatch.setitem(kernels.AUTO, "cpu", ("reference", "torch"))
    monkeypatch.setattr(kernels, "WITH_BACKWARD", ("torch",))
    kernels.choose.cache_clear()
    model = models.wan()
    handle = enable_draft_attention(model)
    model(**models.wan_inputs())
    assert one(handle).backend == "torch"
    run(model, models.wan_inputs())
    assert one(handle).backend == "reference"
    kernels.choose.cache_clear()


def causal_mask(tokens: int) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None]


def pass_mask(layer: torch.nn.Module, mask: Tensor) -> Any:
    """Makes the model pass a mask to one of its attention layers."""

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if "attention_mask" in kwargs:
            return args, kwargs | {"attention_mask": mask}
        return (*args[:2], mask, *args[3:]), kwargs

    return layer.register_forward_pre_hook(hook, with_kwargs=True)


@pytest.mark.parametrize(
    ("name", "layer"), [("wan", "blocks.1.attn1"), ("hunyuan_video", "transformer_blocks.2.attn")]
)
def test_mask_with_queries_runs_dense_and_is_counted(name: str, layer: str) -> None:
    tiny = models.TINY[name]
    model, inputs = tiny.build(), tiny.inputs()
    tokens = 663 + inputs.get("encoder_attention_mask", torch.zeros(1, 0)).shape[1]
    unmasked = run(model, inputs)
    pass_mask(model.get_submodule(layer), causal_mask(tokens))
    stock = run(model, inputs)
    assert models.error(stock, unmasked) > 1e-3
    handle = enable_draft_attention(model, sparsity=0)
    assert models.error(run(model, inputs), stock) < models.FLOAT32_ERROR
    run(model, inputs)
    report = one(handle)
    assert report.dense_calls == {"step": 0, "layer": 2 * len(tiny.dense_layers), "mask": 2, "replacement": 0}
    assert report.densities.pop(layer) is None
    assert set(report.densities.values()) == {1}
    assert "2 by mask" in str(handle.report())


def test_layers_replaced_in_dense_steps_were_not_skipped() -> None:
    """Once before and once behind a sparse step: only the sparse one warns and counts, and nothing is negative."""
    model = models.wan()
    handle = enable_draft_attention(model)
    layer = model.blocks[1].attn1
    ours = layer.processor
    run(model, models.wan_inputs(timestep=990))
    layer.processor = type(ours)._stock()
    run(model, models.wan_inputs(timestep=990))
    assert one(handle).skipped_calls == one(handle).dense_calls["replacement"] == 0
    with pytest.warns(UserWarning, match="1 attention layers of WanTransformer3DModel lost draft attention"):
        run(model, models.wan_inputs())
    run(model, models.wan_inputs(timestep=990))
    layer.processor = ours
    run(model, models.wan_inputs(timestep=990))
    report = one(handle)
    assert report.skipped_calls == report.skipped_forwards == 0
    assert report.dense_calls == {"step": 2 + 1 + 1 + 2, "layer": 5, "mask": 0, "replacement": 1}


def test_mask_in_a_dense_step_counts_as_the_step() -> None:
    model = models.wan()
    pass_mask(model.blocks[1].attn1, causal_mask(663))
    handle = enable_draft_attention(model)
    for timestep in (990, 500, 990):
        run(model, models.wan_inputs(timestep=timestep))
    assert one(handle).dense_calls == {"step": 4, "layer": 3, "mask": 1, "replacement": 0}


def test_key_mask_runs_dense_where_the_family_has_no_padding() -> None:
    model, inputs = models.wan(), models.wan_inputs()
    pass_mask(model.blocks[1].attn1, (torch.arange(663) < 400)[None, None, None])
    stock = run(model, inputs)
    handle = enable_draft_attention(model, sparsity=0)
    assert models.error(run(model, inputs), stock) < models.FLOAT32_ERROR
    assert one(handle).dense_calls["mask"] == 1


def test_after_disable_the_report_stays() -> None:
    pipe = models.wan_pipeline()
    handle = enable_draft_attention(pipe)
    run_wan(pipe)
    before = one(handle)
    handle.disable()
    run_wan(pipe)
    after = one(handle)
    assert not after.attached
    assert str(handle.report()).startswith("transformer (disabled): Wan")
    for field in ("backend", "grid", "blocks", "densities", "dense_layers", "steps", "forwards", "dense_calls"):
        assert getattr(after, field) == getattr(before, field)


def test_two_transformers() -> None:
    pipe = models.wan_pipeline(models.wan(), transformer_2=models.wan(num_layers=2), boundary_ratio=0.8)
    handle = enable_draft_attention(pipe)
    run_wan(pipe, steps=6)
    assert [t > 800 for t in pipe.scheduler.timesteps.tolist()] == [True] * 3 + [False] * 3
    first, second = handle.report().transformers
    assert (first.component, second.component) == ("transformer", "transformer_2")
    assert (first.steps, second.steps) == ({"dense": 2, "sparse": 1}, {"dense": 0, "sparse": 3})
    assert len(first.densities) == 2
    assert len(second.densities) == 1
    assert str(handle.report()) == f"{first}\n{second}"


def test_hunyuan_video_pipeline() -> None:
    pipe = models.hunyuan_video_pipeline()
    handle = enable_draft_attention(pipe)
    run_hunyuan_video(pipe, true_cfg=True)
    report = one(handle)
    dense = sum(t > 945 for t in pipe.scheduler.timesteps.tolist())
    assert report.family == "HunyuanVideo"
    assert report.steps == {"dense": dense, "sparse": 4 - dense}
    assert report.dense_calls == {"step": 2 * dense * 3, "layer": 2 * 4 * 2, "mask": 0, "replacement": 0}
    assert report.blocks == (6, 5)
    assert report.density == pytest.approx((5 + 5 + 6) / 36)


@pytest.mark.parametrize("where", ["before", "inside"])
def test_a_forward_that_fails_counts_nothing_twice(where: str) -> None:
    """As a second forward with a wrong grid, or one that runs out of memory in its second layer."""
    model, inputs = models.wan(), models.wan_inputs()
    handle = diffusers_draft.enable_draft_attention(model, 0.5)
    run(model, inputs)
    before = one(handle)

    def fail(*_: Any) -> None:
        raise OSError("no memory")

    broken = {"before": model, "inside": model.blocks[1].attn1}[where]
    hook = broken.register_forward_pre_hook(fail, prepend=True)
    with pytest.raises(OSError, match="no memory"):
        run(model, inputs)
    hook.remove()
    after = one(handle)
    assert after.skipped_calls == after.skipped_forwards == 0
    assert after.sparse_calls == before.sparse_calls + {"before": 0, "inside": 1}[where]
    assert len(after.run) == len(before.run)
    handle.disable()  # nothing is left running


# The pipeline changes


@pytest.mark.parametrize("expert", ["transformer", "transformer_2"])
def test_a_transformer_that_the_pipeline_no_longer_has(expert: str) -> None:
    pipe = models.wan_pipeline(models.wan(), transformer_2=models.wan(seed=1), boundary_ratio=0.8)
    handle = diffusers_draft.enable_draft_attention(pipe)
    run_wan(pipe, steps=3)
    before = handle.report()
    assert all(report.in_pipeline for report in before.transformers) and "replaced" not in str(before)
    setattr(pipe, expert, models.wan(seed=2))
    run_wan(pipe, steps=3)
    with pytest.warns(UserWarning, match=f"pipeline's {expert} was replaced .* runs dense") as caught:
        report = handle.report()
    assert len(caught) == 1
    assert [found.in_pipeline for found in report.transformers] == [expert != "transformer", expert == "transformer"]
    assert str(report).count("\n  replaced  ") == 1
    assert f"the pipeline's {expert} is not the one that these numbers are of" in str(report)


def test_a_transformer_that_was_replaced_and_enabled_is_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    pipe = models.wan_pipeline()
    first = diffusers_draft.enable_draft_attention(pipe)
    pipe.transformer = models.wan(seed=1)
    second = diffusers_draft.enable_draft_attention(pipe)
    assert not first.report().transformers[0].in_pipeline and second.report().transformers[0].in_pipeline
    pipe.transformer = None
    assert not second.report().transformers[0].in_pipeline
    assert not recwarn.list


def test_wrapped_and_alone_and_without_its_pipeline_a_transformer_is_where_it_was(
    recwarn: pytest.WarningsRecorder,
) -> None:
    pipe = models.wan_pipeline()
    transformer = pipe.transformer
    handle = diffusers_draft.enable_draft_attention(pipe)
    pipe.transformer = torch.nn.Sequential(transformer)
    assert handle.report().transformers[0].in_pipeline
    del pipe
    gc.collect()
    assert handle.report().transformers[0].in_pipeline
    assert diffusers_draft.enable_draft_attention(transformer).report().transformers[0].in_pipeline
    assert not recwarn.list


# Nothing was skipped


@pytest.mark.parametrize(
    ("grid", "options", "reason"),
    [
        ((1, 8, 8), {}, "the video has 0 whole block(s) of 128 tokens, and it takes two to skip a pair"),
        ((1, 8, 16), {}, "the video has 1 whole block(s) of 128 tokens"),
        ((1, 8, 20), {}, "the video has 1 whole block(s) of 128 tokens"),
        (RAGGED, dict(sparsity=0), "the schedule asked for every pair"),
        ((1, 16, 16), dict(sparsity=0.1, schedule="constant"), "so few blocks, 2, that the density asked for is all"),
        (RAGGED, dict(dense_steps=1.0), "every step was dense by the schedule"),
        (RAGGED, dict(dense_layers=(0, 1, 2)), "every layer is in dense_layers"),
        (RAGGED, {}, None),
        ((1, 16, 16), dict(sparsity=0.5, schedule="constant"), None),
    ],
)
def test_why_nothing_was_skipped(grid: models.Grid, options: dict[str, Any], reason: str | None) -> None:
    pipe = models.wan_pipeline()
    handle = diffusers_draft.enable_draft_attention(pipe, **options)
    assert one(handle).nothing_skipped is None and "was skipped" not in str(handle.report())
    run_wan(pipe, grid=grid, steps=2)
    report = one(handle)
    if reason is None:
        assert report.nothing_skipped is None and "was skipped" not in str(report)
    else:
        assert report.nothing_skipped is not None and reason in report.nothing_skipped
        assert f"  nothing   was skipped: {report.nothing_skipped}" in str(report)


def test_a_run_whose_calls_were_all_dense_after_one_that_was_not() -> None:
    pipe = models.wan_pipeline()
    handle = diffusers_draft.enable_draft_attention(pipe, dense_timestep=990)
    run_wan(pipe, steps=2)
    assert one(handle).nothing_skipped is None
    run_wan(pipe, steps=1)
    assert "no call of the latest run was sparse" in str(one(handle))
    assert "  density   no sparse call in the latest run\n" in str(one(handle))


@pytest.mark.parametrize("goal", [{"sparsity": 0.5}, {"max_error": 0.05}])
def test_runs_are_let_go(goal: dict[str, float]) -> None:
    pipe = models.wan_pipeline()
    handle = diffusers_draft.enable_draft_attention(pipe, **goal)
    runs = []
    for _ in range(3):
        run_wan(pipe, steps=2)
        one(handle)
        runs.append(weakref.ref(pipe.scheduler.timesteps))
    gc.collect()
    assert [run() is None for run in runs] == [True, True, False]


def test_forwards_behind_a_run_are_not_of_it() -> None:
    """A loop of one's own, or training, after the validation video."""
    pipe = models.wan_pipeline()
    handle = diffusers_draft.enable_draft_attention(pipe, 0.5)
    run_wan(pipe, steps=2)
    assert len(one(handle).run) == 4
    for timestep in (995, 505):
        run(pipe.transformer, models.wan_inputs(timestep=timestep))
    assert len(one(handle).run) == 2
    run_wan(pipe, steps=3)
    assert len(one(handle).run) == 6


@pytest.mark.parametrize("goal", [{"sparsity": 0.5}, {"max_error": 0.2}])
def test_without_a_known_run_every_forward_is_a_step(goal: dict[str, float]) -> None:
    model = models.wan()
    handle = diffusers_draft.enable_draft_attention(model, tile=(1, 4, 4), **goal)
    for timestep in (900, *[100] * 9):
        run(model, models.wan_inputs(timestep=timestep))
    report = one(handle)
    assert report.steps == {"dense": 0, "sparse": 10} and [forward.step for forward in report.run] == [*range(10)]
    assert report.density == pytest.approx(sum(forward.density for forward in report.run) / 10)
    assert report.error.after == pytest.approx(sum(forward.error.after for forward in report.run) / 10)
    assert 1 - handle.settled_sparsity() == pytest.approx(sum(forward.asked for forward in report.run) / 10)
    assert report.run[0].density > 1.3 * report.run[1].density


def test_runs_that_take_turns_are_counted_apart() -> None:
    """Requests of a server: a report is of the run of the latest forward, with all its steps."""
    counted = tally.Tally(["layer"], 0)
    empty = torch.zeros(0)
    for step in range(4):
        for run in RUNS:
            for _ in range(2):  # with the prompt and without
                counted.begin(1, Moment(run, step, 0, (3.0, 2.0, 1.0, 0.0), 0), SparseStep(0.7, step), 0)
                counted.records["layer"].ran = "sparse"
                counted.records["layer"].call = SparseCall(None, empty, empty, empty)
                counted.end(failed=False, ranks=None)
    assert [forward.number for forward in counted.log] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert counted.counts.steps["sparse"] == 8 and counted.counts.forwards["sparse"] == 16


RUNS = torch.zeros(4), torch.zeros(4)


def test_a_processor_around_ours_skips_nothing() -> None:
    class Around:
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return ours(*args, **kwargs)

    model = models.wan()
    handle = enable_draft_attention(model, sparsity=0.7)
    ours = model.blocks[1].attn1.processor
    model.blocks[1].attn1.processor = Around()
    with pytest.warns(UserWarning, match="lost draft attention"):
        run(model, models.wan_inputs())
    assert one(handle).skipped_calls == 0
