"""What really happened: a report made from what the hot path left behind, only when it is asked for."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..attention import kernels
from ..config import DraftConfig
from .attachment import Attachment
from .chart import chart
from .components import Components, is_in
from .measured import Error, Measured, measured
from .records import SparseForward

T = TypeVar("T")


@dataclass(frozen=True)
class ForwardReport:
    """One sparse forward.

    Attributes:
        step: of the run; where no run is known, how many forwards came before.
        asked: density by the schedule.
        density: share of the pairs of blocks that was computed, mean of the layers.
        error: mean of the layers; None without probes, or if a cache had the results of more layers than ran.
    """

    step: int
    asked: float
    density: float
    error: Error | None


@dataclass(frozen=True)
class TransformerReport:
    """One patched transformer.

    Attributes:
        component: its name in the pipeline.
        family: its family.
        config: the settings in force.
        attached: False once draft attention was disabled.
        in_pipeline: False if the pipeline has this transformer no more: another one is in its place, or none. True for
            a transformer alone, or if the pipeline is gone.
        backend: the backend of the sparse calls, None before the first one.
        backend_reason: why it was chosen.
        grid: `(T, Y, X)` tokens of the last forward, None before the first one.
        blocks: `(N, Nv)` blocks of the last sparse call in all and of video, None before the first one.
        densities: for each sparse layer, by module path, the share of block pairs that its last sparse call computed;
            None if it has not run sparse yet.
        errors: for each sparse layer, by module path, the mean error of its calls in the latest run; empty without
            probes.
        run: the sparse forwards of the latest run, in turn; at most the last 512.
        dense_layers: module paths of the layers left dense.
        steps: denoising steps so far that were `"dense"` and `"sparse"` by the schedule. Where nothing tells the run,
            each forward is one.
        forwards: transformer forwards so far, likewise (more than steps with classifier-free guidance).
        sparse_calls: attention calls so far that ran sparse.
        dense_calls: attention calls so far that ran dense, by reason: `"step"`, `"layer"`, `"mask"` (the model passed
            a mask that draft attention cannot honour) and `"replacement"` (something replaced our processor).
        skipped_calls: calls of sparse layers that did not happen: a cache or another hook did without.
        skipped_forwards: forwards in which none of them happened.
    """

    component: str
    family: str
    config: DraftConfig
    attached: bool
    in_pipeline: bool
    backend: str | None
    backend_reason: str | None
    grid: tuple[int, int, int] | None
    blocks: tuple[int, int] | None
    densities: dict[str, float | None]
    errors: dict[str, Error]
    run: tuple[ForwardReport, ...]
    dense_layers: tuple[str, ...]
    steps: dict[str, int]
    forwards: dict[str, int]
    sparse_calls: int
    dense_calls: dict[str, int]
    skipped_calls: int
    skipped_forwards: int

    @property
    def density(self) -> float | None:
        """Mean density over the sparse steps of the latest run."""
        return _mean_of_steps((forward.step, forward.density) for forward in self.run)

    @property
    def error(self) -> Error | None:
        """Mean error over layers and sparse steps of the latest run; None without probes."""
        return _mean_error(map(_mean_error, _by_step((forward.step, forward.error) for forward in self.run)))

    @property
    def worst_layer(self) -> str | None:
        """Module path of the layer whose error after correction is largest, NaN above all; None without probes."""
        after = {path: error.after for path, error in self.errors.items()}
        return max(after, key=lambda path: (math.isnan(after[path]), after[path]), default=None)

    @property
    def nothing_skipped(self) -> str | None:
        """Why the latest run skipped no pair of blocks; None if it did, or if there was no forward yet."""
        if not sum(self.forwards.values()) or (self.density is not None and self.density < 1):
            return None
        if not self.densities:
            return "every layer is in dense_layers"
        if not self.forwards["sparse"]:
            return "every step was dense by the schedule"
        if self.density is None or self.blocks is None:
            return "no call of the latest run was sparse: its steps, masks, replaced processors or a cache, see calls"
        if self.blocks[1] < 2:
            whole = f"{self.blocks[1]} whole block(s) of {self.config.block} tokens"
            return f"the video has {whole}, and it takes two to skip a pair"
        if all(forward.asked == 1 for forward in self.run):
            return "the schedule asked for every pair"
        return f"the video has so few blocks, {self.blocks[1]}, that the density asked for is all of them"

    def __str__(self) -> str:
        config = self.config
        state = "" if self.attached else " (disabled)"
        goal = f"max_error {config.max_error:g}" if config.sparsity is None else f"sparsity {config.sparsity:g}"
        how = f"{goal} {config.schedule}, {config.budget} budget, {config.score} score"
        lines = [f"{self.component}{state}: {self.family}, {how}"]
        if not self.in_pipeline:
            lines.append(f"  replaced  the pipeline's {self.component} is not the one that these numbers are of")
        lines.append(f"  backend   {self.backend or 'not chosen yet'}" + _why(self.backend_reason))
        if self.grid:
            lines.append(f"  grid      {self.grid} = {math.prod(self.grid):,} video tokens")
        if self.blocks:
            total, video = self.blocks
            lines.append(f"  blocks    {total} of {config.block} tokens, {video} of them video")
        lines.append(f"  density   {self._density_line()}")
        lines += _bars([(forward.step, forward.density) for forward in self.run])
        if self.error and self.worst_layer:
            worst = self.errors[self.worst_layer]
            asked = "" if config.max_error is None else f" (asked for {config.max_error:g})"
            lines.append(
                f"  error     {self.error.before:.3f} before correction, {self.error.after:.3f} after{asked}; worst "
                f"layer {self.worst_layer}: {worst.before:.3f}, {worst.after:.3f}"
            )
            lines += _bars([(forward.step, forward.error.after) for forward in self.run if forward.error])
        lines.append(f"  layers    {len(self.densities)} sparse, {len(self.dense_layers)} dense")
        lines.append(f"  steps     {self.steps['sparse']} sparse, {self.steps['dense']} dense")
        dense = ", ".join(f"{count} by {reason}" for reason, count in self.dense_calls.items() if count)
        lines.append(f"  calls     {self.sparse_calls} sparse; dense: {dense or 'none'}")
        if self.nothing_skipped:
            lines.append(f"  nothing   was skipped: {self.nothing_skipped}")
        if self.skipped_calls:
            lines.append(
                f"  skipped   {self.skipped_calls} calls did not happen, a cache or another hook did without; in "
                f"{self.skipped_forwards} of {sum(self.forwards.values())} forwards all of them"
            )
        return "\n".join(lines)

    def _density_line(self) -> str:
        if self.density is None:
            return "no sparse call in the latest run" if self.sparse_calls else "no sparse call yet"
        values = [forward.density for forward in self.run]
        asked = _mean_of_steps((forward.step, forward.asked) for forward in self.run)
        return f"{self.density:.3f} (forwards from {max(values):.3f} to {min(values):.3f}; asked for {asked:.3f})"


@dataclass(frozen=True)
class DraftReport:
    """The reports of all patched transformers of a pipeline."""

    transformers: tuple[TransformerReport, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.transformers))


def report_on(component: str, attachment: Attachment, components: Components | None) -> TransformerReport:
    """Read the counters; wait for the device to fetch densities and errors.

    Args:
        component: the transformer's name in the pipeline.
        attachment: its settings.
        components: of the pipeline; None where there is none.
    """
    tally = attachment.tally
    records, counts, log = tally.records, tally.counts, tuple(tally.log)
    block = attachment.config.block
    last = {path: record.call for path, record in records.items() if record.call}
    calls = {id(call): call for of in (last, *(forward.calls for forward in log)) for call in of.values()}
    found = dict(zip(calls, measured([*calls.values()], block, attachment.config.probes > 0), strict=True))
    of_last = {path: found[id(call)] for path, call in last.items()}
    of_run = [{path: found[id(call)] for path, call in forward.calls.items()} for forward in log]
    facts = next(iter(last.values())).facts.tolist() if last else None
    choice = kernels.choice_of(facts[3]) if facts else None
    errors = {path: _mean_error(of[path].error for of in of_run if path in of) for path in records}
    return TransformerReport(
        component=component,
        family=attachment.family.name,
        config=attachment.config,
        attached=attachment.attached,
        in_pipeline=is_in(components, attachment),
        backend=choice.name if choice else None,
        backend_reason=choice.reason if choice else None,
        grid=attachment.last_grid,
        blocks=(facts[1], facts[2]) if facts else None,
        densities={path: of_last[path].density if path in of_last else None for path in records},
        errors={path: error for path, error in errors.items() if error},
        run=tuple(_forward_report(*one) for one in zip(log, of_run, strict=True)),
        dense_layers=attachment.dense_layers,
        steps=dict(counts.steps),
        forwards=dict(counts.forwards),
        sparse_calls=counts.calls["sparse"],
        dense_calls={reason: counts.calls[reason] for reason in ("step", "layer", "mask", "replacement")},
        skipped_calls=counts.calls["skipped"],
        skipped_forwards=counts.skipped_forwards,
    )


def _forward_report(forward: SparseForward, calls: dict[str, Measured]) -> ForwardReport:
    density = _mean([call.density for call in calls.values()])
    error = _mean_error(call.error for call in calls.values()) if forward.mostly_ran else None
    return ForwardReport(forward.number, 1 - forward.step.sparsity, density, error)


def _bars(values: Iterable[tuple[int, float]]) -> list[str]:
    bars = chart(values)
    return [f"            {bars}"] if bars else []


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _mean_of_steps(values: Iterable[tuple[int, float]]) -> float | None:
    """Compute the mean over steps of the mean over each step's forwards, of which there may be one or several."""
    means = [_mean(found) for found in _by_step(values)]
    return _mean(means) if means else None


def _by_step(values: Iterable[tuple[int, T]]) -> Iterable[list[T]]:
    """Gather what the forwards of each step have."""
    found: dict[int, list[T]] = {}
    for step, value in values:
        found.setdefault(step, []).append(value)
    return found.values()


def _mean_error(errors: Iterable[Error | None]) -> Error | None:
    known = [error for error in errors if error]
    if not known:
        return None
    return Error(_mean([error.before for error in known]), _mean([error.after for error in known]))


def _why(reason: str | None) -> str:
    return f" ({reason})" if reason else ""
