"""The schedules: what every step of a run is asked for, and what it gets."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import models
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import example, given
from hypothesis import strategies as st
from models import RAGGED, TINY, Loop, run_hunyuan_video, run_wan

from diffusers_draft import DraftConfig, DraftHandle, enable_draft_attention, schedules
from diffusers_draft.families import families, family_of
from diffusers_draft.patching.clock import Moment
from diffusers_draft.patching.report import TransformerReport
from diffusers_draft.patching.schedule import schedule_for
from diffusers_draft.schedules import SCHEDULES

MEAN_ERROR = 1e-9
OPTIONS = Path(__file__).parents[2] / "docs" / "options.md"


def densities(
    config: DraftConfig, steps: int, begin: int = 0, timesteps: tuple[float, ...] | None = None
) -> list[float | None]:
    """What a run of a pipeline asks of its steps from `begin` on; None for a dense one."""
    timesteps = timesteps or tuple(1000.0 * (steps - step) / steps for step in range(steps))
    pipe = Loop(object(), transformer=None)
    schedule = schedule_for(pipe, families()["WanTransformer3DModel"], config)
    run = torch.tensor(timesteps)
    found = [schedule.at(Moment(run, step, begin, timesteps, begin), run[step]) for step in range(begin, steps)]
    assert all(step is None or step.number == begin + index for index, step in enumerate(found))
    return [None if step is None else 1 - step.sparsity for step in found]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def check(found: list[float], sparsity: float) -> None:
    assert mean(found) == pytest.approx(1 - sparsity, abs=MEAN_ERROR)
    assert all(0 < density <= 1 for density in found)
    assert all(later <= earlier for earlier, later in itertools.pairwise(found))


# The shapes


@given(
    mean_density=st.floats(0.001, 1),
    left=st.lists(st.floats(0, 1), min_size=1, max_size=60).map(lambda values: sorted(values, reverse=True)),
)
@example(mean_density=1.0, left=[1.0, 0.5, 0.0])
@example(mean_density=0.2, left=[0.0])
@example(mean_density=0.97, left=[1.0, 1.0, 1.0])
@example(mean_density=0.5, left=[1.0, 0.0])
def test_falling_keeps_the_mean_and_never_rises(mean_density: float, left: list[float]) -> None:
    found = schedules.falling(mean_density, left)
    assert len(found) == len(left)
    check(found, 1 - mean_density)


def test_falling_falls_as_it_says() -> None:
    """Above the end with the third power, the end being as the number of steps says where the start leaves room."""
    left = [1, 0.75, 0.5, 0.25, 0]
    found = schedules.falling(0.2, left)
    assert found[-1] == pytest.approx(0.13)
    assert [(value - 0.13) / (found[0] - 0.13) for value in found] == pytest.approx([share**3 for share in left])
    crowded = schedules.falling(0.8, left)
    assert crowded[0] == 1 and mean(crowded) == pytest.approx(0.8)
    end = crowded[-1]
    assert [(value - end) / (1 - end) for value in crowded] == pytest.approx([share**3 for share in left])


@pytest.mark.parametrize(
    ("steps", "end"), [(1, 1.0), (2, 1.0), (4, 0.75), (8, 0.5), (16, 0.375), (40, 0.3), (100, 0.27)]
)
def test_the_fewer_the_steps_the_less_the_density_falls(steps: int, end: float) -> None:
    left = [1 - index / max(1, steps - 1) for index in range(steps)]
    assert schedules.falling(0.2, left)[-1] == pytest.approx(0.2 * end)


@pytest.mark.parametrize("name", ["constant", "paper"])
def test_the_others_are_constant(name: str) -> None:
    assert SCHEDULES[name](0.2, [1, 0.5, 0]) == [0.2, 0.2, 0.2]


# A run's steps


@pytest.mark.parametrize("sparsity", [0.05, 0.5, 0.8, 0.97])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 50])
def test_the_mean_over_a_run(steps: int, sparsity: float) -> None:
    found = densities(DraftConfig(sparsity=sparsity), steps)
    check([1.0 if density is None else density for density in found], sparsity)
    assert steps < 3 or found[0] is None or found[-1] < found[0]


@given(
    sparsity=st.floats(0.01, 0.99),
    steps=st.integers(1, 60),
    begin=st.floats(0, 1),
    dense=st.none() | st.floats(0, 1),
)
@example(sparsity=0.8, steps=1, begin=0.0, dense=None)
@example(sparsity=0.8, steps=8, begin=0.5, dense=0.25)
@example(sparsity=0.5, steps=50, begin=0.0, dense=None)
def test_the_mean_over_the_sparse_steps_of_any_run(
    sparsity: float, steps: int, begin: float, dense: float | None
) -> None:
    """From the middle as video to video runs, and behind dense steps, which come on top."""
    first = min(steps - 1, int(begin * steps))
    config = DraftConfig(sparsity=sparsity, dense_steps=dense)
    found = densities(config, steps, first)
    on_top = round((dense or 0) * (steps - first))
    assert found[:on_top] == [None] * on_top
    rest = [1.0 if density is None else density for density in found[on_top:]]
    if rest:
        check(rest, sparsity)
    constant = densities(DraftConfig(sparsity=sparsity, schedule="constant", dense_steps=dense), steps, first)
    assert constant == [None] * on_top + [pytest.approx(1 - sparsity)] * len(rest)


@given(sparsity=st.floats(0.01, 0.99), steps=st.integers(2, 60), limit=st.floats(0, 1000))
def test_the_mean_behind_dense_timesteps(sparsity: float, steps: int, limit: float) -> None:
    found = densities(DraftConfig(sparsity=sparsity, dense_timestep=limit), steps)
    dense = sum(1000.0 * (steps - step) / steps > limit for step in range(steps))
    assert found[:dense] == [None] * dense
    rest = [1.0 if density is None else density for density in found[dense:]]
    if rest:
        check(rest, sparsity)


def test_without_sparsity_every_step_computes_everything() -> None:
    assert densities(DraftConfig(sparsity=0), 8) == [1.0] * 8


def test_only_the_paper_s_schedule_has_dense_steps_and_layers_by_default() -> None:
    for schedule in ("falling", "constant"):
        pipe = models.wan_pipeline()
        handle = enable_draft_attention(pipe, 0.8, schedule=schedule)
        assert one(handle).dense_layers == ()
        run_wan(pipe, steps=8)
        assert one(handle).steps == {"dense": 0, "sparse": 8}
    pipe = models.wan_pipeline()
    handle = enable_draft_attention(pipe, 0.8, schedule="paper")
    run_wan(pipe, steps=8)
    assert one(handle).dense_layers == ("blocks.0.attn1",) and one(handle).steps["dense"] > 0


# Pipelines


def one(handle: DraftHandle) -> TransformerReport:
    (report,) = handle.report().transformers
    return report


def asked(*reports: TransformerReport) -> dict[int, float]:
    """What the sparse forwards of the latest run were asked for, by step; those of one step are asked the same."""
    forwards = [forward for report in reports for forward in report.run]
    found = {forward.step: forward.asked for forward in forwards}
    assert all(forward.asked == found[forward.step] for forward in forwards)
    return dict(sorted(found.items()))


def check_run(handle: DraftHandle, sparsity: float, steps: range) -> None:
    """The steps of the latest run that were asked for less than everything have the mean that was asked for."""
    found = asked(*handle.report().transformers)
    dense = [step for step in steps if step not in found]
    assert dense == list(steps)[: len(dense)] and set(found) <= set(steps)
    check([1.0] * len(dense) + list(found.values()), sparsity)


def wan_22() -> Any:
    return models.wan_pipeline(models.wan(), transformer_2=models.wan(seed=1), boundary_ratio=0.8)


PIPELINES: dict[str, tuple[Callable[[], Any], Callable[..., Any]]] = {
    "wan": (models.wan_pipeline, run_wan),
    "wan_22": (wan_22, run_wan),
    "hunyuan_video": (models.hunyuan_video_pipeline, run_hunyuan_video),
}


@pytest.mark.parametrize("sparsity", [0.5, 0.8])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines(name: str, steps: int, sparsity: float) -> None:
    """Two runs, so that the second is not mixed up with the first; two experts share one."""
    make, run = PIPELINES[name]
    pipe = make()
    handle = enable_draft_attention(pipe, sparsity)
    for _ in range(2):
        run(pipe, steps=steps)
        check_run(handle, sparsity, range(steps))
    if name == "wan_22" and steps == 8:
        first, second = handle.report().transformers
        assert first.run and second.run and max(asked(first)) < min(asked(second))


def test_fifty_steps() -> None:
    pipe = models.wan_pipeline()
    handle = enable_draft_attention(pipe, 0.5)
    run_wan(pipe, grid=(1, 16, 24), steps=50, guidance_scale=1.0)
    check_run(handle, 0.5, range(50))


@pytest.mark.parametrize("budget", ["row", "head"])
def test_measured_density_is_the_one_asked_for_up_to_whole_blocks(budget: str) -> None:
    """663 tokens: five video blocks and one anchor."""
    pipe = models.wan_pipeline()
    handle = enable_draft_attention(pipe, 0.6, budget=budget)
    run_wan(pipe, steps=8)
    report = one(handle)
    assert len(report.run) == 2 * 8 and report.blocks == (6, 5)
    for forward in report.run:
        pairs = 5 * max(1, round(forward.asked * 5)) if budget == "row" else max(5, round(forward.asked * 25))
        assert forward.density == pytest.approx((pairs + 5 + 6) / 36)
    assert report.density == pytest.approx(mean([forward.density for forward in report.run]))
    values = [forward.density for forward in report.run]
    line = f"{report.density:.3f} (forwards from {max(values):.3f} to {min(values):.3f}; asked for 0.400)"
    assert f"  density   {line}" in str(report)


def test_video_to_video_begins_in_the_middle() -> None:
    pipe = models.wan_video_to_video_pipeline()
    handle = enable_draft_attention(pipe, 0.8)
    for _ in range(2):
        models.run_video_to_video(pipe, height=256, width=128, steps=8)
        check_run(handle, 0.8, range(4, 8))


@pytest.mark.parametrize("dense_steps", [None, 0.25])
def test_video_to_video_with_a_scheduler_that_counts_before_the_first_step(dense_steps: float | None) -> None:
    """Heun's sets its step_index when it adds the noise, and is told no begin_index."""
    pipe = models.wan_video_to_video_pipeline()
    pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=5.0)
    handle = enable_draft_attention(pipe, 0.8, dense_steps=dense_steps)
    models.run_video_to_video(pipe, height=256, width=128, steps=10)
    report = one(handle)
    dense = 2 if dense_steps else 0
    assert report.steps == {"dense": dense, "sparse": 9 - dense}  # of second order: two forwards for all but one
    check(list(asked(report).values()), 0.8)


@pytest.mark.parametrize("pick", ["transformer_2", "pipe"])
def test_settings_that_have_only_the_end_of_a_run_keep_their_mean(pick: str) -> None:
    """One expert alone, and enabling in the middle of a run."""
    pipe = wan_22() if pick == "transformer_2" else models.wan_pipeline()
    handles = [] if pick == "pipe" else [enable_draft_attention(pipe.transformer_2, 0.8)]

    def enable(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 4 and pick == "pipe":
            handles.append(enable_draft_attention(pipe, 0.8))
        return tensors

    run_wan(pipe, steps=12, callback_on_step_end=enable)
    report = one(handles[0])
    assert report.steps["dense"] == 0 and report.steps["sparse"] < 12
    check(list(asked(report).values()), 0.8)


def test_custom_sigmas() -> None:
    """What counts is the number of the step, not its noise."""
    pipe = models.hunyuan_video_pipeline()
    handle = enable_draft_attention(pipe, 0.8)
    run_hunyuan_video(pipe, steps=5, sigmas=[1.0, 0.99, 0.9, 0.2, 0.1])
    check_run(handle, 0.8, range(5))
    uneven = asked(one(handle))
    run_hunyuan_video(pipe, steps=5)
    assert asked(one(handle)) == uneven


def test_a_scheduler_put_in_after_enabling() -> None:
    pipe = models.wan_pipeline()
    handle = enable_draft_attention(pipe, 0.8)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    run_wan(pipe, steps=6)
    check_run(handle, 0.8, range(6))
    pipe.scheduler = models.wan_scheduler()
    run_wan(pipe, steps=3)
    check_run(handle, 0.8, range(3))


def test_a_pipeline_for_each_request() -> None:
    pipe = models.wan_pipeline()
    handle = enable_draft_attention(pipe, 0.8)
    for steps in (6, 3):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
        request = diffusers.WanPipeline(**pipe.components | {"scheduler": scheduler})
        request.set_progress_bar_config(disable=True)
        run_wan(request, steps=steps)
        check_run(handle, 0.8, range(steps))
        assert one(handle).steps["dense"] == 0


def test_two_stages_are_two_runs() -> None:
    """LTX: a small video, then few steps on a large one."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.LTXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=TINY["LTXVideoTransformer3DModel"].build(),
        scheduler=scheduler,
    )
    pipe.set_progress_bar_config(disable=True)
    handle = enable_draft_attention(pipe, 0.8)
    for (rows, columns), steps in (((8, 16), 6), ((13, 17), 3)):
        pipe(
            prompt_embeds=models.random(1, 12, 8, seed=9),
            prompt_attention_mask=torch.ones(1, 12, dtype=torch.long),
            height=32 * rows,
            width=32 * columns,
            num_frames=17,
            num_inference_steps=steps,
            guidance_scale=1.0,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        )
        check_run(handle, 0.8, range(steps))
        assert one(handle).grid == (3, rows, columns)


@pytest.mark.parametrize("name", ["HunyuanVideoFramepackTransformer3DModel", "HeliosTransformer3DModel"])
def test_every_section_is_a_run(name: str) -> None:
    """FramePack and Helios set the timesteps anew for each section or chunk."""
    if name not in TINY:
        pytest.skip(f"this diffusers has no {name}")
    tiny = TINY[name]
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    loop = Loop(scheduler, transformer=tiny.build())
    handle = enable_draft_attention(loop, 0.8)
    for steps in (4, 4, 3):
        scheduler.set_timesteps(steps)
        for timestep in scheduler.timesteps:
            inputs = tiny.inputs(1, RAGGED, float(timestep))
            models.forward(loop.components["transformer"], inputs)
            scheduler.step(torch.zeros(1), timestep, torch.zeros(1))
        check_run(handle, 0.8, range(steps))
    assert one(handle).steps == {"dense": 0, "sparse": 11}


# Transformers alone


def test_a_transformer_alone_goes_by_its_timestep() -> None:
    """As a run of many even steps would; the mean over all timesteps is what was asked for."""
    model = models.wan()
    handle = enable_draft_attention(model, 0.8)
    timesteps = [1000.0 * share / 20 for share in range(20, -1, -1)]
    for timestep in timesteps:
        models.forward(model, models.wan_inputs(1, (1, 16, 24), timestep))
    found = [forward.asked for forward in one(handle).run]
    assert len(found) == 21
    assert all(later < earlier for earlier, later in itertools.pairwise(found))
    end = 0.2 * (0.25 + 2 / 101)
    assert found[0] <= 1 and found[-1] == pytest.approx(end)
    shares = [share / 20 for share in range(20, -1, -1)]
    assert [(value - end) / (found[0] - end) for value in found] == pytest.approx([share**3 for share in shares])
    schedule = schedule_for(model, family_of(model), DraftConfig())
    steps = [schedule.at(None, torch.tensor([10.0 * share])) for share in range(101)]
    assert mean([1 - step.sparsity for step in steps]) == pytest.approx(0.2, abs=MEAN_ERROR)
    assert len({step.number for step in steps}) == 101


@pytest.mark.parametrize(("shift", "reached"), [(3.0, 0.31), (5.0, 0.36)])
def test_a_transformer_alone_is_denser_under_a_shift_as_the_options_say(shift: float, reached: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(50)
    for name, expected in {"falling": reached, "constant": 0.2}.items():
        model = models.wan()
        schedule = schedule_for(model, family_of(model), DraftConfig(schedule=name))
        found = [1 - schedule.at(None, timestep).sparsity for timestep in scheduler.timesteps]
        assert round(mean(found), 2) == expected
    assert f"{reached} with shift {shift:g}" in " ".join(OPTIONS.read_text().split())


@pytest.mark.parametrize("name", TINY)
def test_a_transformer_alone_whose_timesteps_tell_nothing_is_constant(name: str) -> None:
    model = TINY[name].build()
    family = family_of(model)
    schedule = schedule_for(model, family, DraftConfig())
    found = {schedule.at(None, torch.tensor([float(value)])).sparsity for value in (0, 100, 500, 999)}
    if family.top_timestep is None:
        assert found == {0.8}
        nowhere = torch.empty(2, device="meta")  # it is not even read
        assert schedule.at(None, nowhere).sparsity == 0.8
    else:
        assert len(found) == 4


@pytest.mark.parametrize("timestep", [1000.0, 0.0, -1.0, -2.0])
def test_a_negative_limit_leaves_every_step_of_a_transformer_alone_dense(timestep: float) -> None:
    model = models.wan()
    schedule = schedule_for(model, family_of(model), DraftConfig(dense_timestep=-1))
    assert schedule.at(None, torch.tensor([timestep])) is None


def test_constant_reads_no_timestep() -> None:
    model = models.wan()
    schedule = schedule_for(model, family_of(model), DraftConfig(schedule="constant"))
    assert schedule.at(None, torch.empty(2, device="meta")).sparsity == 0.8


# What is counted


def test_the_first_block_cache_skips_calls_and_the_report_says_so() -> None:
    pipe = models.wan_pipeline()
    handle = enable_draft_attention(pipe, 0.8)
    ran: list[str] = []
    for path, module in pipe.transformer.named_modules():
        if path.endswith("attn1"):
            module.register_forward_pre_hook(lambda module, args, path=path: ran.append(path))
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=1e6))
    run_wan(pipe, steps=6)
    report = one(handle)
    # The first block runs in all forwards, the others in the first one of each half of the guidance.
    assert report.forwards == {"dense": 0, "sparse": 12}
    assert report.sparse_calls == len(ran) == 12 + 2 * 2
    assert report.skipped_calls == 12 * 3 - len(ran)
    assert report.skipped_forwards == 0 and sum(report.dense_calls.values()) == 0
    assert f"skipped   {report.skipped_calls} calls did not happen" in str(report)
    assert [forward.step for forward in report.run] == [step for step in range(6) for _ in range(2)]
    # What one layer measured is not a forward's error.
    assert [forward.error is None for forward in report.run] == [False] * 2 + [True] * 10
    errors = [forward.error.after for forward in report.run if forward.error]
    assert report.error is not None and report.error.after == pytest.approx(mean(errors))


def test_forwards_in_which_a_cache_has_everything() -> None:
    """The first layer stays dense: then no layer of draft attention runs in most forwards."""
    pipe = models.wan_pipeline()
    handle = enable_draft_attention(pipe, 0.8, dense_layers=(0,))
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=1e6))
    run_wan(pipe, steps=6)
    report = one(handle)
    assert report.sparse_calls == 2 * 2
    assert report.skipped_calls == 12 * 2 - 2 * 2
    assert report.skipped_forwards == 10
    assert "in 10 of 12 forwards all of them" in str(report)
    assert len(report.run) == 2


def test_calls_are_counted_where_they_happen() -> None:
    pipe = models.wan_pipeline()
    handle = enable_draft_attention(pipe, 0.8, dense_steps=0.5, dense_layers=(1,))
    run_wan(pipe, steps=6)
    report = one(handle)
    assert report.steps == {"dense": 3, "sparse": 3} and report.forwards == {"dense": 6, "sparse": 6}
    assert report.sparse_calls == 6 * 2
    assert report.dense_calls == {"step": 6 * 2, "layer": 12, "mask": 0, "replacement": 0}
    assert report.skipped_calls == report.skipped_forwards == 0 and "skipped" not in str(report)
