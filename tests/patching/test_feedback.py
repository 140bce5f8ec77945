"""`max_error`: the curve that is fitted, what it decides, and what whole runs arrive at."""

import math
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import run_wan

from diffusers_draft import DraftHandle, enable_draft_attention
from diffusers_draft.patching.error_curve import ErrorCurve, Point
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
    run, left = object(), left_of(steps)
    densities, errors = [], []
    for step in range(steps):
        densities.append(feedback.density(run, left, step, least))
        errors.append(true(densities[-1], left[step]))
        feedback.note(Told(errors[-1]))
    return densities, errors


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


# The curve


@given(level=st.floats(-3, -1), slope=st.floats(0, 4), drift=st.floats(-1, 1))
def test_the_curve_finds_the_law_that_it_is_shown(level: float, slope: float, drift: float) -> None:
    law = ErrorCurve(level, slope, drift, spread=(1, 1, 1))
    points = [Point(d, p, law.error(d, p)) for d in (0.05, 0.1, 0.3, 0.6, 0.9) for p in (1.0, 0.7, 0.2)]
    found = ErrorCurve(-1.5, 1.0, 0.0, spread=(100.0, 100.0, 100.0)).fitted(points)
    assert (found.level, found.slope, found.drift) == pytest.approx((level, slope, drift), abs=1e-3)


def test_one_measurement_moves_the_level_and_leaves_the_rest_nearly_alone() -> None:
    found = USUAL.fitted([Point(0.2, 0.5, 3 * USUAL.error(0.2, 0.5))])
    assert found.error(0.2, 0.5) == pytest.approx(3 * USUAL.error(0.2, 0.5), rel=0.05)
    assert abs(found.slope - USUAL.slope) < 0.3 and abs(found.drift - USUAL.drift) < 0.2


def test_steps_that_skipped_nothing_teach_nothing() -> None:
    assert USUAL.fitted([Point(1.0, 1.0, 0.0), Point(0.5, 0.5, 0.0)]) == USUAL


def test_errors_that_rise_with_density_do_not_turn_the_curve() -> None:
    assert USUAL.fitted([Point(0.1 * step, 0.5, 0.001 * 10**step) for step in range(1, 8)]).slope == 0


# Its decisions


@given(
    target=st.sampled_from([0.03, 0.05, 0.1, 0.2]),
    level=st.floats(-2.6, -1.2),
    slope=st.floats(0.5, 3),
    drift=st.floats(-0.5, 0.5),
    steps=st.integers(8, 50),
    shape=st.sampled_from([falling, constant]),
    seed=st.integers(0, 99),
)
def test_a_run_arrives_at_the_error_asked_for(
    target: float, level: float, slope: float, drift: float, steps: int, shape: Any, seed: int
) -> None:
    """Unless it is at a bound: every step at the least density, or dense from some step on."""
    generator = torch.Generator().manual_seed(seed)
    law = ErrorCurve(level, slope, drift, spread=(1, 1, 1))

    def true(density: float, left: float) -> float:
        return law.error(density, left) * math.exp(0.05 * float(torch.randn((), generator=generator)))

    densities, errors = simulate(Feedback(target, shape), steps, true)
    bounded = densities[-1] in (1.0, 0.01)
    assert bounded or mean(errors) == pytest.approx(target, rel=0.15)
    if densities[-1] == 1.0:
        assert mean(errors) < 1.3 * target + max(errors[:LAG]) / steps * LAG


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_next_run_begins_with_what_the_last_has_learned(steps: int) -> None:
    """Also where runs are too short to correct themselves, as those of one or two steps are."""
    law = ErrorCurve(-1.0, 2.0, 0.2, spread=(1, 1, 1))
    feedback = Feedback(0.1, falling)
    reached = [mean(simulate(feedback, steps, law.error)[1]) for _ in range(6)]
    assert steps == 4 or abs(reached[0] / 0.1 - 1) > 0.15
    assert reached[-1] == pytest.approx(0.1, rel=0.1)


def test_a_step_goes_by_step_numbers_and_not_by_what_has_arrived() -> None:
    class Late:
        """A reading that nobody may look at until enough steps have begun."""

        def __init__(self, step: int) -> None:
            self.step = step

        @property
        def error(self) -> float:
            assert begun >= self.step + LAG
            return 0.07

    feedback, run, left = Feedback(0.05, falling), object(), left_of(10)
    for step in range(10):
        begun = step
        feedback.density(run, left, step, 0.01)
        feedback.note(Late(step))
        feedback.note(Late(step))


def test_forwards_of_a_step_get_one_density_and_count_as_their_mean() -> None:
    once, twice, left = Feedback(0.05, falling), Feedback(0.05, falling), left_of(8)
    for step in range(8):
        density = once.density("run", left, step, 0.01)
        assert twice.density("run", left, step, 0.01) == density
        once.note(Told(0.06))
        twice.note(Told(0.04))
        assert twice.density("run", left, step, 0.01) == density
        twice.note(Told(0.08))


def test_a_run_that_begins_again_is_a_new_one() -> None:
    """A loop that does not set its timesteps anew."""
    feedback, left = Feedback(0.1, falling), left_of(6)
    first = feedback.density("run", left, 0, 0.01)
    for step in range(6):
        feedback.density("run", left, step, 0.01)
        feedback.note(Told(0.3))
    assert feedback.density("run", left, 0, 0.01) > first
    assert feedback.density("run", left, 1, 0.01) < 1


def test_steps_without_a_measurement_do_not_count() -> None:
    """Those that a cache skipped, and those with nothing but NaN."""
    feedback, left, errors = Feedback(0.05, falling), left_of(30), []
    for step in range(30):
        density = feedback.density("run", left, step, 0.01)
        if step % 3 == 1:
            continue
        if step % 3 == 2:
            feedback.note(Told(None))
            continue
        errors.append(USUAL.error(density, left[step]) * 1.2)
        feedback.note(Told(errors[-1]))
    assert mean(errors) == pytest.approx(0.05, rel=0.2)


def test_a_loop_without_a_known_run_settles() -> None:
    law = ErrorCurve(-1.5, 2.0, 0.3, spread=(1, 1, 1))
    feedback, left = Feedback(0.08, falling), left_of(100)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0)).tolist()
    errors = {}
    for _ in range(2):
        for step in order:
            errors[step] = law.error(feedback.density(None, left, step, 0.01), left[step])
            feedback.note(Told(errors[step]))
    assert mean(list(errors.values())) == pytest.approx(0.08, rel=0.1)


# What a forward measures


def test_a_reading_is_the_mean_over_layers() -> None:
    squares = [torch.tensor([9.0, 4.0, 100.0]), torch.tensor([9.0, 1.0, 100.0]), torch.zeros(3)]
    assert Reading(squares, None).error == pytest.approx((0.2 + 0.1 + 0) / 3)


def test_layers_that_are_not_finite_are_left_out() -> None:
    broken = [torch.tensor([1.0, math.nan, 1.0]), torch.tensor([1.0, math.inf, 1.0])]
    assert Reading([*broken, torch.tensor([9.0, 4.0, 100.0])], None).error == pytest.approx(0.2)
    assert Reading(broken, None).error is None


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
