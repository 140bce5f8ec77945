"""Prediction of a whole run from measured steps, and its densities, step by step."""

from collections.abc import Sequence
from operator import attrgetter
from types import SimpleNamespace

import numpy as np
import torch

from ...config import DraftConfig
from ...families import family_of
from ...families.family import Family
from ...patching.clock import Moment
from ...patching.schedule import schedule_for
from .models import MODELS
from .step import NOT_DENSE, ONE_GPU, Step


def densities_of_run(name: str, config: DraftConfig, num_steps: int) -> list[float | None]:
    """List the density of every step of a model's run; None for a dense step."""
    scheduler = MODELS[name].scheduler()
    scheduler.set_timesteps(num_steps)
    schedule = schedule_for(SimpleNamespace(scheduler=scheduler), _family(name), config)
    timesteps = scheduler.timesteps
    run = tuple(timesteps.tolist())
    steps = [schedule.at(Moment(timesteps, step, 0, run, 0), timesteps[step]) for step in range(num_steps)]
    return [1 - step.sparsity if step else None for step in steps]


def densities_to_measure(name: str, config: DraftConfig, num_steps: int) -> list[float]:
    """Choose the densities that tell the time of a run: its lowest, its highest, and last their mean."""
    sparse = [density for density in densities_of_run(name, config, num_steps) if density is not None]
    ends = {min(sparse), max(sparse)} if sparse else set()
    return [*sorted(ends - {1 - config.known_sparsity}), 1 - config.known_sparsity]


def predict(name: str, config: DraftConfig, steps: Sequence[Step], num_steps: int) -> dict[str, float]:
    """Predict the time of a whole run, with the best dense attention and with draft attention.

    Args:
        name: key of `MODELS`.
        config: settings of the run.
        steps: from `step.run`.
        num_steps: denoising steps of the run.

    Returns:
        Numbers by name; those in `_s` are seconds, those in `_ms` milliseconds.
    """
    model = MODELS[name]
    best = best_dense(steps)
    draft = sorted((step for step in steps if step.density is not None and step.name not in NOT_DENSE), key=_density)
    densities = densities_of_run(name, config, num_steps)
    sparse = [density for density in densities if density is not None]
    known = [_density(step) for step in draft]
    step_ms = [_with_dense_layers(step, best, _family(name), config) for step in draft]
    sparse_ms = float(np.interp(sparse, known, step_ms).mean()) if sparse else best.step_ms
    dense_steps = len(densities) - len(sparse)
    draft_ms = dense_steps * best.step_ms + len(sparse) * sparse_ms
    return _over_gpus(name, steps) | {
        "steps": num_steps,
        "dense_steps": dense_steps,
        "dense_s": num_steps * model.forwards * best.step_ms / 1e3,
        "draft_s": model.forwards * draft_ms / 1e3,
        "sparse_step_ms": sparse_ms,
        "best_dense_step_ms": best.step_ms,
        "step_speedup": best.step_ms / sparse_ms,
        "run_speedup": num_steps * best.step_ms / draft_ms,
    }


def best_dense(steps: Sequence[Step]) -> Step:
    """Find the fastest dense attention among measured steps."""
    return min(
        (step for step in steps if step.density is None and step.name not in NOT_DENSE), key=attrgetter("step_ms")
    )


def _with_dense_layers(step: Step, dense: Step, family: Family, config: DraftConfig) -> float:
    """Add what the dense layers of the paper's schedule cost."""
    layers = family.dense_layers if config.schedule == "paper" and config.dense_layers is None else ()
    kinds = [path.split(".")[0] for path in layers]
    return step.step_ms + sum(dense.block_ms[kind] - step.block_ms[kind] for kind in kinds)


def _over_gpus(name: str, steps: Sequence[Step]) -> dict[str, float]:
    """Compare several GPUs with the one that was measured first, if they were."""
    alone = next((step for step in steps if step.name == ONE_GPU), None)
    if alone is None:
        return {}
    draft, layers = steps[-1], sum(length for _, _, length in MODELS[name].blocks)
    return {
        "gpu_speedup": alone.step_ms / draft.step_ms,
        "exchange_share": layers * draft.exchange_ms / draft.step_ms,
    }


def _family(name: str) -> Family:
    with torch.device("meta"):
        family = family_of(MODELS[name].build(**{key: 1 for _, key, _ in MODELS[name].blocks}))
    assert family is not None, "every model here is of a known family"
    return family


def _density(step: Step) -> float:
    assert step.density is not None, "of draft attention"
    return step.density
