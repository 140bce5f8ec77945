import gc
import math
import sys
from collections import Counter
from typing import Any

import models
import pytest
import torch
from diffusers import (
    ConfigMixin,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    PNDMScheduler,
    WanPipeline,
)
from models import Loop, run_hunyuan_video, run_wan
from paper import enable_draft_attention

import diffusers_draft
from diffusers_draft import DraftHandle
from diffusers_draft.attention.ops import Attended
from diffusers_draft.patching import clock as clock_module
from diffusers_draft.patching import dispatch
from diffusers_draft.patching.clock import Clock

SMALL = (1, 8, 16)
"""One block: what is dense here is decided by the schedule alone."""


def counts(handle: DraftHandle, kind: str) -> dict[str, int]:
    return getattr(handle.report().transformers[0], kind)


def watch(handle: DraftHandle, transformer: torch.nn.Module) -> list[bool]:
    """Appends for every forward from here on whether it was dense."""
    seen: list[bool] = []
    before = dict(counts(handle, "forwards"))

    def hook(*_: Any) -> None:
        nonlocal before
        now = dict(counts(handle, "forwards"))
        (kind,) = (kind for kind in now if now[kind] > before[kind])
        before = now
        seen.append(kind == "dense")

    transformer.register_forward_hook(hook)
    return seen


def euler(**options: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=5.0, **options)


def wan_forward(transformer: torch.nn.Module, timestep: float) -> None:
    with torch.no_grad():
        transformer(**models.wan_inputs(1, SMALL, timestep))


@pytest.mark.parametrize("scheduler", [models.wan_scheduler, euler])
def test_wan_pipeline_is_dense_above_its_default_timestep(scheduler: Any) -> None:
    pipe = models.wan_pipeline(scheduler=scheduler())
    handle = enable_draft_attention(pipe)
    seen = watch(handle, pipe.transformer)
    run_wan(pipe, grid=SMALL, steps=12)
    expected = [t > 925 for t in pipe.scheduler.timesteps.tolist()]
    assert 0 < sum(expected) < 12
    assert seen == [dense for dense in expected for _ in ("cond", "uncond")]
    assert counts(handle, "steps") == {"dense": sum(expected), "sparse": 12 - sum(expected)}
    assert counts(handle, "forwards") == {"dense": 2 * sum(expected), "sparse": 24 - 2 * sum(expected)}


@pytest.mark.parametrize("true_cfg", [False, True])
def test_hunyuan_video_pipeline_is_dense_above_its_default_timestep(true_cfg: bool) -> None:
    pipe = models.hunyuan_video_pipeline()
    handle = enable_draft_attention(pipe)
    seen = watch(handle, pipe.transformer)
    run_hunyuan_video(pipe, grid=SMALL, steps=10, true_cfg=true_cfg)
    expected = [t > 945 for t in pipe.scheduler.timesteps.tolist()]
    assert 0 < sum(expected) < 10
    assert seen == [dense for dense in expected for _ in range(1 + true_cfg)]
    assert counts(handle, "steps") == {"dense": sum(expected), "sparse": 10 - sum(expected)}


@pytest.mark.parametrize(
    ("options", "dense"),
    [
        (dict(dense_steps=0.25), 2),
        (dict(dense_steps=0), 0),
        (dict(dense_steps=1.0), 8),
        (dict(dense_steps=0.25, dense_timestep=0), 2),
        (dict(dense_timestep=math.inf), 0),
        (dict(dense_timestep=0), 8),
        (dict(dense_timestep=850), 3),
        (dict(dense_timestep=800), 4),
    ],
)
def test_options(options: dict[str, float], dense: int) -> None:
    pipe = models.wan_pipeline()
    handle = enable_draft_attention(pipe, **options)
    seen = watch(handle, pipe.transformer)
    run_wan(pipe, grid=SMALL, steps=8, guidance_scale=1.0)
    assert pipe.scheduler.timesteps[:7].tolist() == pytest.approx([999, 954, 900, 833, 750, 643, 500], abs=1)
    assert seen == [True] * dense + [False] * (8 - dense)
    assert counts(handle, "steps") == {"dense": dense, "sparse": 8 - dense}


@pytest.mark.parametrize(("below", "dense"), [(0, 3), (0.5, 4)])
def test_a_step_at_the_threshold_is_sparse(below: float, dense: int) -> None:
    pipe = models.wan_pipeline()
    pipe.scheduler.set_timesteps(8)
    handle = enable_draft_attention(pipe, dense_timestep=float(pipe.scheduler.timesteps[3]) - below)
    run_wan(pipe, grid=SMALL, steps=8)
    assert counts(handle, "steps") == {"dense": dense, "sparse": 8 - dense}


def test_every_run_begins_anew() -> None:
    pipe = models.wan_pipeline()
    handle = enable_draft_attention(pipe, dense_steps=0.5)
    seen = watch(handle, pipe.transformer)
    for steps in (4, 4, 2, 6):
        run_wan(pipe, grid=SMALL, steps=steps, guidance_scale=1.0)
    assert seen == [True] * 2 + [False] * 2 + [True] * 2 + [False] * 2 + [True, False] + [True] * 3 + [False] * 3
    assert counts(handle, "steps") == {"dense": 8, "sparse": 8}


def test_two_runs_of_one_step_are_two_steps() -> None:
    pipe = models.wan_pipeline()
    handle = enable_draft_attention(pipe, dense_steps=1.0)
    for _ in range(2):
        run_wan(pipe, grid=SMALL, steps=1)
    assert counts(handle, "steps") == {"dense": 2, "sparse": 0}
    assert counts(handle, "forwards") == {"dense": 4, "sparse": 0}


def test_an_interrupted_run_leaves_nothing_behind() -> None:
    pipe = models.wan_pipeline()
    handle = enable_draft_attention(pipe, dense_steps=0.5)
    seen = watch(handle, pipe.transformer)

    def interrupt(pipe: Any, step: int, timestep: int, inputs: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 2
        return inputs

    run_wan(pipe, grid=SMALL, steps=4, guidance_scale=1.0, callback_on_step_end=interrupt)
    assert seen == [True, True, False]
    run_wan(pipe, grid=SMALL, steps=4, guidance_scale=1.0)
    assert seen[3:] == [True, True, False, False]


def test_a_scheduler_put_into_the_pipeline_later_is_the_one_that_counts() -> None:
    pipe = models.wan_pipeline()
    handle = enable_draft_attention(pipe, dense_steps=0.25)
    pipe.scheduler = euler()
    seen = watch(handle, pipe.transformer)
    run_wan(pipe, grid=SMALL, steps=8, guidance_scale=1.0)
    assert seen == [True] * 2 + [False] * 6


def test_enabled_in_the_middle_of_a_run() -> None:
    pipe = models.wan_pipeline()
    seen: list[list[bool]] = []

    def enable(pipe: Any, step: int, timestep: int, inputs: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            seen.append(watch(enable_draft_attention(pipe, dense_steps=0.5), pipe.transformer))
        return inputs

    run_wan(pipe, grid=SMALL, steps=6, guidance_scale=1.0, callback_on_step_end=enable)
    assert seen == [[True, False, False, False]]


def test_a_run_that_was_joined_in_the_middle_and_then_repeated() -> None:
    """With the same timesteps: the mean is then that of all its steps."""
    transformer, scheduler = models.wan(), DDIMScheduler()
    loop = Loop(scheduler, transformer=transformer)
    scheduler.set_timesteps(8)
    handle = diffusers_draft.enable_draft_attention(loop, 0.8)
    for first in (4, 0):
        for timestep in scheduler.timesteps[first:]:
            wan_forward(transformer, float(timestep))
        (report,) = handle.report().transformers
        latest = report.run[first - 8 :]
        assert [forward.step for forward in latest] == [*range(first, 8)]
        assert sum(forward.asked for forward in latest) / len(latest) == pytest.approx(0.2)


def test_a_training_behind_a_run_is_not_of_it() -> None:
    """Also at the timestep with which the run began."""
    transformer, scheduler = models.wan(), DDIMScheduler()
    handle = diffusers_draft.enable_draft_attention(Loop(scheduler, transformer=transformer))
    scheduler.set_timesteps(8)
    for timestep in scheduler.timesteps:
        wan_forward(transformer, float(timestep))
    transformer(**models.wan_inputs(1, SMALL, float(scheduler.timesteps[0])))
    (report,) = handle.report().transformers
    assert [forward.step for forward in report.run] == [8]


@pytest.mark.parametrize(("options", "dense"), [(dict(dense_steps=0.5), 3), (dict(dense_timestep=600), 2), ({}, 0)])
def test_run_that_begins_late(options: dict[str, float], dense: int) -> None:
    """With a begin index, as pipelines set it for a strength below 1."""
    transformer, scheduler = models.wan(), euler()
    loop = Loop(scheduler, transformer=transformer)
    handle = enable_draft_attention(loop, **options)
    seen = watch(handle, transformer)
    for _ in range(2):
        scheduler.set_timesteps(12)
        scheduler.set_begin_index(7)
        sample = torch.zeros(1)
        for timestep in loop.scheduler.timesteps[7:]:
            wan_forward(transformer, float(timestep))
            sample = scheduler.step(torch.zeros(1), timestep, sample).prev_sample
    if "dense_steps" in options:
        dense = round(0.5 * 5)
    else:
        limit = options.get("dense_timestep", 925)
        assert dense == sum(t > limit for t in scheduler.timesteps[7:].tolist())
    assert seen == 2 * ([True] * dense + [False] * (5 - dense))
    assert counts(handle, "steps") == {"dense": 2 * dense, "sparse": 2 * (5 - dense)}


@pytest.mark.parametrize(("options", "dense"), [({}, 0), (dict(dense_steps=0.5), 2), (dict(dense_timestep=600), 2)])
def test_wan_video_to_video(options: dict[str, float], dense: int) -> None:
    """This pipeline runs the last timesteps of the scheduler and never sets a begin index."""
    pipe = models.wan_video_to_video_pipeline()
    handle = enable_draft_attention(pipe, **options)
    seen = watch(handle, pipe.transformer)
    models.run_video_to_video(pipe, height=64, width=64, steps=8)
    assert pipe.scheduler.timesteps[4:7].tolist() == pytest.approx([750, 643, 500], abs=1)
    assert seen == [True] * dense + [False] * (4 - dense)
    assert counts(handle, "steps") == {"dense": dense, "sparse": 4 - dense}


def test_scheduler_of_second_order() -> None:
    transformer, scheduler = models.wan(), FlowMatchHeunDiscreteScheduler(shift=5.0)
    loop = Loop(scheduler, transformer=transformer)
    handle = enable_draft_attention(loop)
    seen = watch(handle, transformer)
    scheduler.set_timesteps(6)
    sample = torch.zeros(1)
    for timestep in loop.scheduler.timesteps:
        wan_forward(transformer, float(timestep))
        sample = scheduler.step(torch.zeros(1), timestep, sample).prev_sample
    expected = [t > 925 for t in scheduler.timesteps.tolist()]
    assert 0 < sum(expected) < len(expected)
    assert seen == expected


@pytest.mark.parametrize("first", [0, 2, 6])
def test_a_run_of_second_order_that_begins_late_begins_where_its_scheduler_does(first: int) -> None:
    """Each timestep but the first comes twice, and pipelines leave out whole pairs without setting a begin index."""
    transformer, scheduler = models.wan(), FlowMatchHeunDiscreteScheduler(shift=5.0)
    loop = Loop(scheduler, transformer=transformer)
    handle = diffusers_draft.enable_draft_attention(loop)
    for _ in range(2):
        scheduler.set_timesteps(6)
        steps, sample = [], torch.zeros(1)
        for timestep in scheduler.timesteps[first:]:
            wan_forward(transformer, float(timestep))
            sample = scheduler.step(torch.zeros(1), timestep, sample).prev_sample
            steps.append(scheduler.step_index - 1)
        assert steps == list(range(first, 11))
        (report,) = handle.report().transformers
        assert [forward.step for forward in report.run] == steps
        assert sum(forward.asked for forward in report.run) / len(steps) == pytest.approx(0.2)
    assert counts(handle, "steps") == {"dense": 0, "sparse": 2 * len(steps)}


@pytest.mark.parametrize(
    ("options", "dense"),
    [({}, 1), (dict(dense_timestep=600), 4), (dict(dense_steps=0.3), 3), (dict(dense_timestep=math.inf), 0)],
)
def test_scheduler_without_step_index(options: dict[str, float], dense: int) -> None:
    transformer, scheduler = models.wan(), DDIMScheduler(timestep_spacing="trailing")
    assert not hasattr(scheduler, "step_index")
    loop = Loop(scheduler, transformer=transformer)
    handle = enable_draft_attention(loop, **options)
    seen = watch(handle, transformer)
    for _ in range(2):
        scheduler.set_timesteps(10)
        for timestep in loop.scheduler.timesteps:
            wan_forward(transformer, float(timestep))
            wan_forward(transformer, float(timestep))
    assert scheduler.timesteps.tolist() == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert seen == 2 * ([True] * 2 * dense + [False] * 2 * (10 - dense))
    assert counts(handle, "steps") == {"dense": 2 * dense, "sparse": 2 * (10 - dense)}


@pytest.mark.parametrize(
    ("options", "limit"), [({}, 925), (dict(dense_timestep=600), 600), (dict(dense_steps=0), 9999)]
)
def test_transformer_alone_reads_the_timestep(options: dict[str, float], limit: float) -> None:
    transformer = models.wan()
    handle = enable_draft_attention(transformer, **options)
    seen = watch(handle, transformer)
    timesteps = [999.0, 926.0, 925.0, 924.9, 601.0, 600.0, 0.0, 950.0]
    for timestep in timesteps:
        wan_forward(transformer, timestep)
    assert seen == [t > limit for t in timesteps]


def test_timesteps_of_tokens_count_by_their_largest() -> None:
    transformer = models.wan()
    handle = enable_draft_attention(transformer)
    seen = watch(handle, transformer)
    with torch.no_grad():
        for timestep in (990, 500):
            transformer(**models.wan_ti2v_inputs(2, (2, 4, 4), timestep))
    assert seen == [True, False]


def test_wan_pipeline_with_timesteps_of_tokens() -> None:
    pipe = models.wan_pipeline()
    pipe.register_to_config(expand_timesteps=True)
    handle = enable_draft_attention(pipe)
    seen = watch(handle, pipe.transformer)
    run_wan(pipe, grid=(2, 4, 4), steps=8, guidance_scale=1.0)
    assert seen == [True] * 2 + [False] * 6


def test_dense_steps_need_a_run() -> None:
    transformer = models.wan()
    with pytest.raises(ValueError, match=r"dense_steps=0\.25 is a share of a run.*dense_timestep"):
        enable_draft_attention(transformer, dense_steps=0.25)
    assert not transformer._forward_pre_hooks


def patched_without_pipeline(**options: Any) -> tuple[DraftHandle, dict[str, Any]]:
    """Components of a pipeline that was patched and is gone."""
    pipe = models.wan_pipeline()
    return enable_draft_attention(pipe, **options), dict(pipe.components)


def test_transformer_outlives_its_pipeline() -> None:
    """Its step is not known any more, so the timestep argument decides."""
    handle, components = patched_without_pipeline(dense_timestep=600)
    gc.collect()
    seen = watch(handle, components["transformer"])
    for timestep in (700, 500):
        wan_forward(components["transformer"], timestep)
    assert seen == [True, False]


def test_dense_steps_outlive_their_pipeline() -> None:
    """Other pipelines of the same parts have the same scheduler."""
    handle, components = patched_without_pipeline(dense_steps=0.5)
    gc.collect()
    seen = watch(handle, components["transformer"])
    pipe = WanPipeline(**components)
    for steps in (4, 6):
        run_wan(pipe, grid=SMALL, steps=steps, guidance_scale=1.0)
    assert seen == [True] * 2 + [False] * 2 + [True] * 3 + [False] * 3


@pytest.mark.parametrize("scheduler", [None, PNDMScheduler()])
@pytest.mark.parametrize("options", [{}, dict(dense_timestep=math.inf)])
def test_dense_steps_that_nothing_tells_warn_once_and_are_a_share_of_the_noise(
    scheduler: Any, options: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a scheduler, and with one that has no timesteps yet."""
    transformer = models.wan()
    handle = enable_draft_attention(Loop(scheduler, transformer=transformer), dense_steps=0.5, **options)
    seen = watch(handle, transformer)
    reads = count_reads(monkeypatch)
    with pytest.warns(UserWarning, match=r"dense_steps=0\.5 is a share.*nothing tells the step") as caught:
        for timestep in (950, 510, 500, 20):
            wan_forward(transformer, timestep)
    assert len(caught) == 1
    assert seen == [True, True, False, False]
    assert reads["__float__"] == 4


def test_dense_steps_that_nothing_tells_are_none_where_timesteps_do_not_tell_the_noise() -> None:
    tiny = models.TINY["CosmosTransformer3DModel"]
    transformer = tiny.build()
    handle = enable_draft_attention(Loop(None, transformer=transformer), dense_steps=0.5)
    with pytest.warns(UserWarning, match=r"dense_steps=0\.5 is a share.*no step is dense"):
        models.forward(transformer, tiny.inputs(1, SMALL, 0.9))
    assert counts(handle, "forwards") == {"dense": 0, "sparse": 1}


# One transformer, many schedulers


def request(pipe: Any) -> WanPipeline:
    """What a server makes for each request."""
    return quiet(WanPipeline(**pipe.components | {"scheduler": models.wan_scheduler()}))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_and_stop_in_the_middle(pipe: Any) -> None:
    def stop(*_: Any) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        run_wan(pipe, grid=SMALL, steps=6, callback_on_step_end=stop)


BEFORE: dict[str, Any] = {
    "never run": lambda pipe: None,
    "run": lambda pipe: run_wan(pipe, grid=SMALL, steps=3),
    "stopped in the middle": run_and_stop_in_the_middle,
}


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("make", [request, lambda pipe: quiet(WanPipeline.from_pipe(pipe, scheduler=euler()))])
def test_the_scheduler_of_the_pipeline_that_runs_counts(make: Any, before: str) -> None:
    pipe = models.wan_pipeline()
    handle = enable_draft_attention(pipe, dense_steps=0.5)
    BEFORE[before](pipe)
    seen = watch(handle, pipe.transformer)
    for steps in (4, 6):
        other = make(pipe)
        assert other.transformer is pipe.transformer and other.scheduler is not pipe.scheduler
        run_wan(other, grid=SMALL, steps=steps, guidance_scale=1.0)
    run_wan(pipe, grid=SMALL, steps=2, guidance_scale=1.0)
    assert seen == [True] * 2 + [False] * 2 + [True] * 3 + [False] * 3 + [True, False]


def test_a_pipeline_within_a_run_of_another_has_its_own_steps() -> None:
    pipe = models.wan_pipeline()
    handle = enable_draft_attention(pipe, dense_steps=0.5)
    seen = watch(handle, pipe.transformer)

    def run_another(_: Any, step: int, timestep: int, inputs: dict[str, Any]) -> dict[str, Any]:
        run_wan(request(pipe), grid=SMALL, steps=2, guidance_scale=1.0)
        return inputs

    run_wan(pipe, grid=SMALL, steps=4, guidance_scale=1.0, callback_on_step_end=run_another)
    assert seen == [dense for outer in (True, True, False, False) for dense in (outer, True, False)]


def test_a_transformer_that_was_enabled_alone_follows_the_pipeline_that_runs_it() -> None:
    pipe = models.wan_pipeline()
    handle = diffusers_draft.enable_draft_attention(pipe.transformer)
    run_wan(pipe, grid=SMALL, steps=5)
    (report,) = handle.report().transformers
    assert [forward.step for forward in report.run] == [step for step in range(5) for _ in range(2)]
    assert sum(forward.asked for forward in report.run) / 10 == pytest.approx(0.2)


@pytest.mark.parametrize("before", BEFORE)
def test_a_loop_with_a_scheduler_of_its_own_goes_by_its_timesteps(before: str) -> None:
    """Draft attention does not know its scheduler, and that of the pipeline is not the one that runs."""
    pipe = models.wan_pipeline()
    handle = enable_draft_attention(pipe, dense_timestep=800)
    BEFORE[before](pipe)
    seen = watch(handle, pipe.transformer)
    for timestep in (990.0, 970.0, 810.0, 790.0, 100.0):
        wan_forward(pipe.transformer, timestep)
    assert seen == [True] * 3 + [False] * 2


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("scheduler", [models.wan_scheduler, euler])
@pytest.mark.filterwarnings("ignore:dense_steps")
def test_every_forward_of_a_training_goes_by_its_own_timestep(scheduler: Any, before: str) -> None:
    pipe = models.wan_pipeline(scheduler=scheduler())
    handle = enable_draft_attention(pipe, dense_steps=0.25)
    BEFORE[before](pipe)
    check_training(handle, pipe.transformer)


@pytest.mark.parametrize("steps", [None, 10])
@pytest.mark.filterwarnings("ignore:dense_steps")
def test_every_forward_of_a_training_with_a_scheduler_that_counts_no_steps(steps: int | None) -> None:
    transformer, scheduler = models.wan(), DDIMScheduler()
    if steps:
        scheduler.set_timesteps(steps)
    check_training(enable_draft_attention(Loop(scheduler, transformer=transformer), dense_steps=0.25), transformer)


SCHEDULERS = [models.wan_scheduler, euler, DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler]


@pytest.mark.parametrize("make", SCHEDULERS)
@pytest.mark.parametrize(("steps", "gradients"), [(1000, False), (20, True)])
@pytest.mark.filterwarnings("ignore:dense_steps")
def test_a_training_at_the_timesteps_of_a_scheduler(make: Any, steps: int, gradients: bool) -> None:
    """All of them or a few; the scheduler is at none. The first one begins no run."""
    transformer, scheduler = models.wan(), make()
    scheduler.set_timesteps(steps)
    handle = enable_draft_attention(Loop(scheduler, transformer=transformer), dense_steps=0.25)
    seen = watch(handle, transformer)
    timesteps = [float(scheduler.timesteps[int(share * steps)]) for share in (0.75, 0.05, 0.45, 0.1, 0.6, 0.2)]
    for timestep in timesteps:
        with torch.set_grad_enabled(gradients):
            transformer(**models.wan_inputs(1, SMALL, timestep))
    assert seen == [timestep > 750 for timestep in timesteps]


@pytest.mark.filterwarnings("ignore:dense_steps")
def test_a_training_of_a_model_whose_timesteps_are_in_other_units() -> None:
    """Nothing tells the step: it is not the first one of a scheduler that does not run, which would be dense."""
    tiny = models.TINY["CosmosTransformer3DModel"]
    transformer, scheduler = tiny.build(), euler()
    scheduler.set_timesteps(20)
    handle = enable_draft_attention(Loop(scheduler, transformer=transformer), dense_steps=0.25)
    seen = watch(handle, transformer)
    for _ in range(3):
        transformer(**tiny.inputs())
    assert seen == [False] * 3


@pytest.mark.parametrize("make", [DDIMScheduler, DDPMScheduler])
def test_a_loop_that_begins_late_with_a_scheduler_that_counts_no_steps(make: Any) -> None:
    transformer, scheduler = models.wan(), make()
    handle = enable_draft_attention(Loop(scheduler, transformer=transformer), dense_steps=0.5)
    seen = watch(handle, transformer)
    for _ in range(2):
        scheduler.set_timesteps(50)
        for timestep in scheduler.timesteps[40:]:
            wan_forward(transformer, float(timestep))
    assert seen == 2 * ([True] * 5 + [False] * 5)


def check_training(handle: DraftHandle, transformer: torch.nn.Module) -> None:
    seen = watch(handle, transformer)
    timesteps = [303.0, 903.0, 603.0, 810.0, 740.0, 760.0, 5.0]
    for timestep in timesteps:
        transformer(**models.wan_inputs(1, SMALL, timestep)).sample.sum().backward()
    assert seen == [timestep > 750 for timestep in timesteps]


class OnGpu:
    """A timestep that counts how often it is read."""

    device = torch.device("cuda")
    dtype = torch.bfloat16

    def __init__(self, value: float) -> None:
        self.value = value
        self.reads = 0

    def max(self) -> float:
        self.reads += 1
        return self.value


def gpu_timestep(value: float) -> Any:
    return OnGpu(value)


@pytest.mark.parametrize("begin", [None, 0])
def test_a_loop_on_a_gpu_compares_timesteps(begin: int | None) -> None:
    """Also where its scheduler has just moved: a forward for validation behind a step is none of its run."""
    scheduler = euler()
    loop = Loop(scheduler, transformer=None)
    clock = Clock(loop)
    scheduler.set_timesteps(4)
    if begin is not None:
        scheduler.set_begin_index(begin)
    for step, timestep in enumerate(scheduler.timesteps):
        for _ in range(2):
            moment = clock.at(gpu_timestep(float(timestep)))
            assert moment is not None and (moment.step, moment.begin) == (step, 0)
        scheduler.step(torch.zeros(1), timestep, torch.zeros(1))
        assert clock.at(gpu_timestep(float(timestep) - 40)) is None
    stale = gpu_timestep(500.0)
    assert clock.at(stale) is None and stale.reads == 0  # its run is over


class Pipeline(ConfigMixin):
    """What the clock takes for a pipeline of diffusers."""

    config_name = "config.json"

    def __init__(self, scheduler: Any, transformer: Any = None) -> None:
        self.scheduler = scheduler
        self.transformer = transformer
        self.components = {"transformer": transformer}

    def calls(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)


def test_a_pipeline_on_a_gpu_never_waits_once_its_scheduler_counts() -> None:
    pipe = Pipeline(euler())
    clock = Clock(pipe)
    pipe.scheduler.set_timesteps(4)
    pipe.scheduler.set_begin_index(0)
    for step, timestep in enumerate(pipe.scheduler.timesteps):
        given = gpu_timestep(float(timestep))
        assert pipe.calls(clock.at, given).step == step
        assert given.reads == 0
        pipe.scheduler.step(torch.zeros(1), timestep, torch.zeros(1))


@pytest.mark.filterwarnings("ignore:dense_steps")
def test_a_forward_in_a_callback_with_another_timestep_is_not_the_step_of_the_pipeline() -> None:
    pipe = models.wan_pipeline()
    handle = enable_draft_attention(pipe, dense_steps=0.5)
    seen = watch(handle, pipe.transformer)

    def validate(pipe: Any, step: int, timestep: int, inputs: dict[str, Any]) -> dict[str, Any]:
        wan_forward(pipe.transformer, 100.0 if step == 0 else 990.0)
        return inputs

    run_wan(pipe, grid=SMALL, steps=4, guidance_scale=1.0, callback_on_step_end=validate)
    assert seen == [True, False, True, True, False, True, False, True]


def test_a_stale_scheduler_is_found_out_on_a_gpu() -> None:
    scheduler = euler()
    loop = Loop(scheduler, transformer=None)
    clock = Clock(loop)
    scheduler.set_timesteps(4)
    scheduler.step(torch.zeros(1), scheduler.timesteps[0], torch.zeros(1))
    for value in (999.0, 300.0, 600.0):
        assert clock.at(gpu_timestep(value)) is None


def count_reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts how often the forward hook and the schedule read a tensor's values from here on."""
    reads: Counter[str] = Counter()

    def counting(name: str) -> Any:
        original = getattr(torch.Tensor, name)

        def method(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if sys._getframe(1).f_globals["__name__"] in (
                "diffusers_draft.patching.clock",
                "diffusers_draft.patching.schedule",
                "diffusers_draft.patching.attachment",
            ):
                reads[name] += 1
            return original(tensor, *args, **kwargs)

        return method

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, counting(name))
    return reads


def test_timesteps_are_read_once_in_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = models.wan_pipeline()
    handle = enable_draft_attention(pipe)
    monkeypatch.setattr(clock_module, "_is_free_to_read", lambda tensor: False)  # as on a GPU
    reads = count_reads(monkeypatch)
    for run in (1, 2):
        run_wan(pipe, grid=SMALL, steps=6)
        # Where the pipeline does not say where the run begins, its first step's forwards read their timestep.
        assert reads["tolist"] == run and reads["__float__"] <= 2 * run and set(reads) <= {"tolist", "__float__"}
    monkeypatch.undo()
    assert counts(handle, "forwards") == {"dense": 8, "sparse": 16}


@pytest.mark.parametrize("name", ["wan", "wan_ti2v", "hunyuan_video"])
def test_forward_hook_reads_nothing_on_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the meta device have no values, so that reading one raises; the scheduler knows where it begins."""
    tiny = models.TINY[name]
    with torch.device("meta"):
        transformer = tiny.build()
    inputs = {key: value.to("meta") for key, value in tiny.inputs(2).items()}
    with pytest.raises(RuntimeError, match="meta"):
        inputs["timestep"].max().item()
    scheduler = euler()
    scheduler.set_timesteps(8)
    scheduler.set_begin_index(0)
    pipe = Pipeline(scheduler, transformer)
    handle = enable_draft_attention(pipe)

    def attend(query: torch.Tensor, *_: object) -> Attended:
        calls.append(query)
        return Attended(query, torch.ones(2), torch.ones(3), torch.ones(4))

    calls: list[torch.Tensor] = []
    monkeypatch.setattr(dispatch, "attend", attend)
    for timestep in scheduler.timesteps:
        with torch.no_grad():
            pipe.calls(transformer, **inputs)
        scheduler.step(torch.zeros(1), timestep, torch.zeros(1))
    dense = sum(t > tiny.dense_timestep for t in scheduler.timesteps.tolist())
    assert 0 < dense < 8
    assert len(calls) == (8 - dense) * (len(tiny.layers) - len(tiny.dense_layers))
    assert handle._attachments["transformer"].tally.counts.forwards == {"dense": dense, "sparse": 8 - dense}
