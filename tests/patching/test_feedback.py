"""`max_error`: the curve that is fitted, what it decides, and what whole runs arrive at."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import models
import pytest
import torch
from diffusers import FirstBlockCacheConfig, FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from models import run_wan

from diffusers_draft import DraftHandle, enable_draft_attention
from diffusers_draft.patching.error_curve import FLOOR, ErrorCurve, Point
from diffusers_draft.patching.feedback import LAG, USUAL, Feedback, Reading
from diffusers_draft.schedules import constant, falling

FINE = (3, 24, 32)
"""18 blocks of 128 tokens: enough for densities in between."""
TILE = (1, 4, 4)
"""Small blocks, many of them."""


class Told:
    """A reading that is there at once."""

    def __init__(self, error: float | None) -> None:
        self.error = error


def left_of(steps: int) -> list[float]:
    return [1 - step / steps for step in range(steps)]


def simulate(
    feedback: Feedback, steps: int, true: Callable[[float, float], float], least: float = 0.01
) -> tuple[list[float], list[float]]:
    """Run a model whose errors follow a law; return its densities and errors."""
    run, left = torch.empty(0), left_of(steps)
    densities, errors = [], []
    for step in range(steps):
        asked = feedback.step(run, left, step, least)
        densities.append(asked.density)
        errors.append(true(asked.density, left[step]))
        asked.readings.append(Told(errors[-1]))
    return densities, errors


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


# The curve


def law_of(level: float, slope: float, drift: float, start: float = 0.4) -> ErrorCurve:
    """Make a law that errors follow; nothing is fitted to it."""
    return ErrorCurve(level, slope, drift, start, spread=(1.0, 1.0, 1.0, 1.0))


def test_the_curve_is_what_its_docstring_says() -> None:
    curve = law_of(-4.0, 0.8, 0.5, start=0.3)
    assert curve.error(0.5, 0.0) == pytest.approx(math.exp(-4) * (0.5 / (0.5 + FLOOR)) ** 0.8)
    assert curve.error(0.1, 0.5) == pytest.approx(math.exp(-4 + 0.25) * (0.9 / (0.1 + FLOOR)) ** 0.8)
    assert curve.error(0.1, 1.0) == pytest.approx(math.exp(-4 + 0.5 + 0.3) * (0.9 / (0.1 + FLOOR)) ** 0.8)
    assert curve.error(1.0, 0.5) == 0


@given(level=st.floats(-6, -2), slope=st.floats(0, 2), drift=st.floats(-1, 1), start=st.floats(-1, 1))
def test_the_curve_finds_the_law_that_it_is_shown(level: float, slope: float, drift: float, start: float) -> None:
    law = law_of(level, slope, drift, start)
    points = [Point(d, p, law.error(d, p)) for d in (0.05, 0.1, 0.3, 0.6, 0.9) for p in (1.0, 0.7, 0.2)]
    found = ErrorCurve(-4.0, 1.0, 0.0, 0.0, spread=(100.0, 100.0, 100.0, 100.0)).fitted(points)
    assert (found.level, found.slope, found.drift, found.start) == pytest.approx(
        (level, slope, drift, start), abs=1e-3
    )


def test_measurements_move_the_curve_there_and_hardly_elsewhere() -> None:
    found = USUAL.fitted([Point(0.2, 0.5, 2 * USUAL.error(0.2, 0.5))] * 4)
    assert found.error(0.2, 0.5) == pytest.approx(2 * USUAL.error(0.2, 0.5), rel=0.1)
    assert abs(found.slope - USUAL.slope) < 0.1 and abs(found.drift - USUAL.drift) < 0.3


def test_the_first_step_of_a_run_tells_little_of_the_others() -> None:
    """Its input is all noise: captions have one error there, and errors of their own later."""
    found = USUAL.fitted([Point(0.2, 1.0, 2 * USUAL.error(0.2, 1.0))])
    assert found.error(0.2, 1.0) > 1.5 * USUAL.error(0.2, 1.0)
    assert found.error(0.2, 0.9) < 1.4 * USUAL.error(0.2, 0.9)


def test_steps_that_skipped_nothing_teach_nothing() -> None:
    assert USUAL.fitted([Point(1.0, 1.0, 0.0), Point(0.5, 0.5, 0.0)]) == USUAL


def test_errors_that_rise_with_density_do_not_turn_the_curve() -> None:
    assert USUAL.fitted([Point(0.1 * step, 0.5, 0.001 * 10**step) for step in range(1, 8)]).slope == 0


# Its decisions


def arrives(law: ErrorCurve, target: float, steps: int, shape: Any, seed: int, runs: int, below: float = 0.15) -> None:
    """Assert that the last of some runs arrives at the target or, by so much, below it, unless it is at a bound."""
    generator = torch.Generator().manual_seed(seed)

    def true(density: float, left: float) -> float:
        return law.error(density, left) * math.exp(0.05 * float(torch.randn((), generator=generator)))

    feedback = Feedback(target, shape)
    for _ in range(runs):
        densities, errors = simulate(feedback, steps, true)
    at_bound = densities[-1] < 0.0101 or densities[-1] > 0.999
    assert at_bound or 1 - below < mean(errors) / target < 1.15


RUNS: dict[str, Any] = dict(
    target=st.sampled_from([0.03, 0.05, 0.1, 0.2]), shape=st.sampled_from([falling, constant]), seed=st.integers(0, 99)
)


@given(
    level=st.floats(-4.5, -3.9), slope=st.floats(0.65, 0.9), drift=st.floats(0, 0.8), steps=st.integers(10, 50), **RUNS
)
def test_the_first_run_arrives_if_the_model_is_like_those_seen(
    level: float, slope: float, drift: float, steps: int, target: float, shape: Any, seed: int
) -> None:
    arrives(law_of(level, slope, drift), target, steps, shape, seed, runs=1, below=0.45)


@given(
    level=st.floats(-5.5, -3.2),
    slope=st.floats(0.4, 1.1),
    drift=st.floats(-0.5, 1.5),
    steps=st.integers(10, 50),
    **RUNS,
)
def test_a_later_run_arrives_whatever_the_model_is_like(
    level: float, slope: float, drift: float, steps: int, target: float, shape: Any, seed: int
) -> None:
    arrives(law_of(level, slope, drift), target, steps, shape, seed, runs=3)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_next_run_begins_with_what_the_last_has_learned(steps: int) -> None:
    """Also where runs are too short to correct themselves, as those of one or two steps are."""
    law = law_of(-3.3, 0.6, 0.2)
    feedback = Feedback(0.1, falling)
    reached = [mean(simulate(feedback, steps, law.error)[1]) for _ in range(6)]
    assert steps == 4 or abs(reached[0] / 0.1 - 1) > 0.15
    assert reached[-1] == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("steps", [4, 14])
def test_a_run_that_is_as_thought_keeps_to_the_shape(steps: int) -> None:
    densities, errors = simulate(Feedback(0.1, falling), steps, USUAL.error)
    assert densities == pytest.approx(falling(mean(densities), left_of(steps)), rel=1e-4)
    assert mean(errors) == pytest.approx(0.1, rel=1e-4)


def test_a_run_makes_up_for_too_dense_steps_only_in_part() -> None:
    """Errors turn out half as large as thought: to arrive exactly, the second half would have 0.63 of the shape."""
    densities, _ = simulate(Feedback(0.1, falling), 20, lambda density, left: 0.5 * USUAL.error(density, left))
    shape = falling(mean(densities), left_of(20))
    late = [density / usual for density, usual in zip(densities[10:], shape[10:], strict=True)]
    assert mean(late) == pytest.approx(0.83, abs=0.04)


@pytest.mark.parametrize("target", [0.03, 0.05])
def test_the_last_of_few_steps_does_not_make_up_for_all(target: float) -> None:
    """Few pairs are left to save, and much is to lose: to arrive exactly it would have 0.2 to 0.3 of the shape."""
    densities, _ = simulate(Feedback(target, falling), 4, lambda density, left: 0.5 * USUAL.error(density, left))
    late = [density / usual for density, usual in zip(densities, falling(mean(densities), left_of(4)), strict=True)]
    assert min(late) > 0.6


def test_a_run_makes_up_for_too_sparse_steps() -> None:
    _, errors = simulate(Feedback(0.1, falling), 20, lambda density, left: 2 * USUAL.error(density, left))
    assert mean(errors) == pytest.approx(0.1, rel=0.05)


def test_a_step_goes_by_step_numbers_and_not_by_what_has_arrived() -> None:
    class Late:
        """A reading that nobody may look at until enough steps have begun."""

        def __init__(self, step: int) -> None:
            self.step = step

        @property
        def error(self) -> float:
            assert begun >= self.step + LAG
            return 0.07

    feedback, run, left = Feedback(0.05, falling), torch.empty(0), left_of(10)
    for step in range(10):
        begun = step
        feedback.step(run, left, step, 0.01).readings += [Late(step), Late(step)]


def test_forwards_of_a_step_get_one_density_and_count_as_their_mean() -> None:
    once, twice, left, run = Feedback(0.05, falling), Feedback(0.05, falling), left_of(8), torch.empty(0)
    for step in range(8):
        asked, same = once.step(run, left, step, 0.01), twice.step(run, left, step, 0.01)
        assert same.density == asked.density
        asked.readings.append(Told(0.06))
        same.readings.append(Told(0.04))
        assert twice.step(run, left, step, 0.01) is same
        same.readings.append(Told(0.08))


def test_a_run_that_begins_again_is_a_new_one() -> None:
    """A loop that does not set its timesteps anew."""
    feedback, left, run = Feedback(0.1, falling), left_of(6), torch.empty(0)
    first = feedback.step(run, left, 0, 0.01).density
    for step in range(6):
        feedback.step(run, left, step, 0.01).readings.append(Told(0.3))
    assert feedback.step(run, left, 0, 0.01).density > first
    assert feedback.step(run, left, 1, 0.01).density < 1


def test_a_run_goes_on_whatever_runs_in_between() -> None:
    """Several requests of a server: each has timesteps of its own, and its errors come after another's step began."""

    def steps_of(feedback: Feedback, level: float) -> Iterator[float]:
        run, left = torch.empty(0), left_of(10)
        for step in range(10):
            asked = feedback.step(run, left, step, 0.01)
            yield asked.density
            asked.readings.append(Told(law_of(level, 0.8, 0.5).error(asked.density, left[step])))

    alone = list(steps_of(Feedback(0.1, falling), -4.0))
    feedback = Feedback(0.1, falling)
    first, second = steps_of(feedback, -4.0), steps_of(feedback, -4.6)
    begun = next(first)
    assert [begun, *(density for density, _ in zip(first, second, strict=False))] == alone


def test_steps_without_a_measurement_do_not_count() -> None:
    """Those that a cache skipped, and those with nothing but NaN."""
    feedback, left, run, errors = Feedback(0.05, falling), left_of(30), torch.empty(0), []
    for step in range(30):
        asked = feedback.step(run, left, step, 0.01)
        if step % 3 == 1:
            continue
        if step % 3 == 2:
            asked.readings.append(Told(None))
            continue
        errors.append(USUAL.error(asked.density, left[step]) * 1.2)
        asked.readings.append(Told(errors[-1]))
    assert mean(errors) == pytest.approx(0.05, rel=0.2)


def test_a_loop_without_a_known_run_settles() -> None:
    law = law_of(-3.8, 0.6, 0.3)
    feedback, left = Feedback(0.08, falling), left_of(100)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0)).tolist()
    errors = {}
    for _ in range(2):
        for step in order:
            asked = feedback.step(None, left, step, 0.01)
            errors[step] = law.error(asked.density, left[step])
            asked.readings.append(Told(errors[step]))
    assert mean(list(errors.values())) == pytest.approx(0.08, rel=0.1)


def test_forwards_of_which_nothing_tells_the_step_settle() -> None:
    """A transformer alone whose timesteps do not tell it, or at one timestep."""
    feedback, errors = Feedback(0.05, constant), []
    for _ in range(12):
        asked = feedback.step(None, [1.0], 0, 0.01)
        errors.append(law_of(-3.0, 0.7, 0.0).error(asked.density, 1.0))
        asked.readings.append(Told(errors[-1]))
    assert errors[-1] == pytest.approx(0.05, rel=0.1) and len(asked.readings) == 1


# What a forward measures


def test_a_reading_is_the_mean_over_layers() -> None:
    squares = [torch.tensor([9.0, 4.0, 100.0]), torch.tensor([9.0, 1.0, 100.0]), torch.zeros(3)]
    assert Reading(squares).error == pytest.approx((0.2 + 0.1 + 0) / 3)


def test_layers_that_are_not_finite_are_left_out() -> None:
    broken = [torch.tensor([1.0, math.nan, 1.0]), torch.tensor([1.0, math.inf, 1.0])]
    assert Reading([*broken, torch.tensor([9.0, 4.0, 100.0])]).error == pytest.approx(0.2)
    assert Reading(broken).error is None


# Whole runs


def reached(handle: DraftHandle) -> tuple[float, list[float]]:
    run = [forward for transformer in handle.report().transformers for forward in transformer.run]
    return mean([forward.error.after for forward in run]), [forward.density for forward in run]


@pytest.fixture(scope="module")
def usual_error() -> float:
    """What a tiny pipeline arrives at with half of the pairs: an error in the middle of what it can have."""
    pipe = models.wan_pipeline()
    with enable_draft_attention(pipe, 0.5, tile=TILE, probes=16) as handle:
        run_wan(pipe, steps=12, grid=FINE)
        return reached(handle)[0]


def test_a_pipeline_arrives_at_the_error_asked_for(usual_error: float) -> None:
    pipe = models.wan_pipeline()
    with enable_draft_attention(pipe, max_error=usual_error, tile=TILE, probes=16) as handle:
        for _ in range(2):
            run_wan(pipe, steps=12, grid=FINE)
        error, densities = reached(handle)
        settled = handle.settled_sparsity()
        text = str(handle.report())
    assert error == pytest.approx(usual_error, rel=0.15)
    assert settled == pytest.approx(1 - mean(densities), abs=0.02)
    assert f"max_error {usual_error:g} falling" in text and f"(asked for {usual_error:g})" in text
    with enable_draft_attention(pipe, settled, tile=TILE, probes=16) as handle:
        run_wan(pipe, steps=12, grid=FINE)
        assert reached(handle)[0] == pytest.approx(usual_error, rel=0.15)


def test_the_same_seed_gives_the_same_video(usual_error: float) -> None:
    videos = []
    for _ in range(2):
        pipe = models.wan_pipeline()
        with enable_draft_attention(pipe, max_error=usual_error, tile=TILE, probes=16):
            videos.append(run_wan(pipe, steps=6, grid=FINE))
    assert torch.equal(*videos)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_short_runs_settle_from_run_to_run(steps: int, usual_error: float) -> None:
    pipe, target = models.wan_pipeline(), 1.3 * usual_error
    with enable_draft_attention(pipe, max_error=target, tile=TILE, probes=16) as handle:
        for _ in range(4):
            run_wan(pipe, steps=steps, grid=FINE)
        assert reached(handle)[0] == pytest.approx(target, rel=0.25)


def test_two_experts_are_one_run(usual_error: float) -> None:
    pipe = models.wan_pipeline(models.wan(), transformer_2=models.wan(seed=1), boundary_ratio=0.9)
    with enable_draft_attention(pipe, max_error=usual_error, tile=TILE, probes=16) as handle:
        for _ in range(2):
            run_wan(pipe, steps=12, grid=FINE)
        report = handle.report()
        assert all(transformer.run for transformer in report.transformers)
        assert reached(handle)[0] == pytest.approx(usual_error, rel=0.15)


def test_a_run_that_begins_in_the_middle(usual_error: float) -> None:
    """Video to video: its steps are the run."""
    model = models.wan()
    loop = models.Loop(FlowMatchEulerDiscreteScheduler(), transformer=model)
    with enable_draft_attention(loop, max_error=usual_error, tile=TILE, probes=16) as handle, torch.no_grad():
        for _ in range(2):
            loop.scheduler.set_timesteps(20)
            loop.scheduler.set_begin_index(10)
            for timestep in loop.scheduler.timesteps[10:]:
                model(**models.wan_inputs(1, FINE) | {"timestep": timestep.expand(1)})
                loop.scheduler.step(torch.zeros(1), timestep, torch.zeros(1))
        error, densities = reached(handle)
    assert len(densities) == 10
    assert error == pytest.approx(usual_error, rel=0.15) or max(densities[2:]) == min(densities[2:])


def test_a_cache_that_skips_layers(usual_error: float) -> None:
    pipe = models.wan_pipeline()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e6))
    with enable_draft_attention(pipe, max_error=usual_error, tile=TILE, probes=16) as handle:
        run_wan(pipe, steps=8, grid=FINE)
        report = handle.report().transformers[0]
        (attachment,) = handle._attachments.values()
        steps = [forward.step.asked for forward in attachment.tally.log]
    assert report.skipped_calls > 0 and 0 < report.error.after < 1
    # Only the first step's forwards were whole: one layer does not tell the error of the others.
    assert [len(step.readings) for step in steps] == [2, 2] + [0] * 14


def test_a_layer_whose_output_is_not_finite_is_left_out_of_the_decision() -> None:
    densities = []
    for broken in (False, True):
        model = models.wan(num_layers=4)
        if broken:
            model.blocks[3].attn1.to_v.weight.data[0] = torch.nan
        loop = models.Loop(FlowMatchEulerDiscreteScheduler(), transformer=model)
        with enable_draft_attention(loop, max_error=0.05, tile=TILE, probes=16) as handle, torch.no_grad():
            loop.scheduler.set_timesteps(6)
            for timestep in loop.scheduler.timesteps:
                model(**models.wan_inputs(1, FINE) | {"timestep": timestep.expand(1)})
                loop.scheduler.step(torch.zeros(1), timestep, torch.zeros(1))
            report = handle.report().transformers[0]
        assert math.isnan(report.error.after) == broken
        densities.append([forward.asked for forward in report.run])
    assert all(0 < density < 1 for density in densities[1][LAG:])


def test_a_video_of_which_nothing_can_be_skipped() -> None:
    pipe = models.wan_pipeline()
    with enable_draft_attention(pipe, max_error=0.05) as handle:
        run_wan(pipe, steps=3, grid=(1, 8, 8))
        report = handle.report().transformers[0]
    assert report.error.after == 0 and report.density == 1
    assert "it takes two to skip a pair" in report.nothing_skipped


def test_a_transformer_alone_goes_by_what_it_has_measured(usual_error: float) -> None:
    model = models.wan()
    with enable_draft_attention(model, max_error=usual_error, tile=TILE, probes=16) as handle, torch.no_grad():
        for _ in range(3):
            for step in range(20):
                model(**models.wan_inputs(1, FINE, timestep=1000 - 50 * step))
        run = handle.report().transformers[0].run[-20:]
    assert mean([forward.error.after for forward in run]) == pytest.approx(usual_error, rel=0.25)


@pytest.mark.parametrize("goal", [{"sparsity": 0.8}, {"max_error": 0.05}])
def test_settled_sparsity_is_the_mean_of_steps_however_many_forwards_each_has(goal: dict[str, float]) -> None:
    """Guidance that ends early: the first steps, which are denser, have two forwards and the last ones one."""

    def end_guidance(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 3:
            pipe._guidance_scale = 1.0
        return tensors

    pipe = models.wan_pipeline()
    with enable_draft_attention(pipe, tile=TILE, probes=16, **goal) as handle:
        run_wan(pipe, steps=10, grid=FINE, callback_on_step_end=end_guidance)
        report = handle.report().transformers[0]
        settled = handle.settled_sparsity()
    by_step = {forward.step: forward for forward in report.run}
    assert len(report.run) == 14 and len(by_step) == 10
    assert settled == pytest.approx(1 - mean([forward.asked for forward in by_step.values()]))
    assert report.density == pytest.approx(mean([forward.density for forward in by_step.values()]))
    if "sparsity" in goal:
        assert settled == pytest.approx(0.8) and "asked for 0.200" in str(report)


def test_settled_sparsity_needs_a_run() -> None:
    with pytest.raises(RuntimeError, match="No sparse step ran yet: run the pipeline once"):
        enable_draft_attention(models.wan(), max_error=0.05).settled_sparsity()
