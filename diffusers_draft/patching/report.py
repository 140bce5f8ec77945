"""What really happened: a report made from what the hot path left behind, only when it is asked for."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..attention import kernels
from ..config import DraftConfig
from .attachment import Attachment
from .records import SparseCall, SparseForward


@dataclass(frozen=True)
class Error:
    """Relative error of an attention output, measured on the probes.

    Attributes:
        before: of the sparse output, without correction.
        after: of the corrected one, with each probe left out of its own fit.
    """

    before: float
    after: float


@dataclass(frozen=True)
class ForwardReport:
    """One sparse forward.

    Attributes:
        step: of the run.
        asked: density by the schedule.
        density: share of the pairs of blocks that was computed, mean of the layers.
        error: mean of the layers; None without probes.
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
        backend: the backend of the sparse calls, None before the first one.
        backend_reason: why it was chosen.
        grid: `(T, Y, X)` tokens of the last forward, None before the first one.
        blocks: `(N, Nv)` blocks of the last sparse call in all and of video, None before the first one.
        densities: for each sparse layer, by module path, the share of block pairs that its last sparse call computed;
            None if it has not run sparse yet.
        errors: for each sparse layer, by module path, the mean error of its calls in the latest run; empty without
            probes.
        run: the sparse forwards of the latest run, in turn.
        dense_layers: module paths of the layers left dense.
        steps: denoising steps so far that were `"dense"` and `"sparse"` by the schedule.
        forwards: transformer forwards so far, likewise (more than steps with classifier-free guidance).
        sparse_calls: attention calls so far that ran sparse.
        dense_calls: attention calls so far that ran dense, by reason: `"step"`, `"layer"`, `"mask"` (the model passed
            a mask that draft attention cannot honour) and `"replacement"` (something replaced our processor).
        skipped_calls: calls of sparse layers that did not happen: a cache had the result.
        skipped_forwards: forwards in which none of them happened.
    """

    component: str
    family: str
    config: DraftConfig
    attached: bool
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
        """Mean density of the sparse forwards of the latest run."""
        return _mean([forward.density for forward in self.run]) if self.run else None

    @property
    def error(self) -> Error | None:
        """Mean error over layers and sparse forwards of the latest run; None without probes."""
        return _mean_error(forward.error for forward in self.run)

    @property
    def worst_layer(self) -> str | None:
        """Module path of the layer whose error after correction is largest; None without probes."""
        return max(self.errors, key=lambda path: self.errors[path].after, default=None)

    def __str__(self) -> str:
        config = self.config
        state = "" if self.attached else " (disabled)"
        how = f"sparsity {config.sparsity:g} {config.schedule}, {config.budget} budget, {config.score} score"
        lines = [f"{self.component}{state}: {self.family}, {how}"]
        lines.append(f"  backend   {self.backend or 'not chosen yet'}" + _why(self.backend_reason))
        if self.grid:
            lines.append(f"  grid      {self.grid} = {math.prod(self.grid):,} video tokens")
        if self.blocks:
            total, video = self.blocks
            lines.append(f"  blocks    {total} of {config.block} tokens, {video} of them video")
        lines.append(f"  density   {self._density_line()}")
        if self.error and self.worst_layer:
            worst = self.errors[self.worst_layer]
            lines.append(
                f"  error     {self.error.before:.3f} before correction, {self.error.after:.3f} after; worst layer "
                f"{self.worst_layer}: {worst.before:.3f}, {worst.after:.3f}"
            )
        lines.append(f"  layers    {len(self.densities)} sparse, {len(self.dense_layers)} dense")
        lines.append(f"  steps     {self.steps['sparse']} sparse, {self.steps['dense']} dense")
        dense = ", ".join(f"{count} by {reason}" for reason, count in self.dense_calls.items() if count)
        lines.append(f"  calls     {self.sparse_calls} sparse; dense: {dense or 'none'}")
        if self.skipped_calls:
            lines.append(
                f"  skipped   {self.skipped_calls} calls did not happen, a cache had their result; in "
                f"{self.skipped_forwards} of {sum(self.forwards.values())} forwards all of them"
            )
        return "\n".join(lines)

    def _density_line(self) -> str:
        if self.density is None:
            return "no sparse call yet"
        values = [forward.density for forward in self.run]
        asked = _mean([forward.asked for forward in self.run])
        return f"{self.density:.3f} (forwards from {max(values):.3f} to {min(values):.3f}; asked for {asked:.3f})"


@dataclass(frozen=True)
class DraftReport:
    """The reports of all patched transformers of a pipeline."""

    transformers: tuple[TransformerReport, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.transformers))


def report_on(component: str, attachment: Attachment) -> TransformerReport:
    """Read the counters; wait for the device to fetch densities and errors."""
    records, counts, block = attachment.records, attachment.counts, attachment.config.block
    call = next((record.call for record in records.values() if record.call), None)
    facts = call.facts.tolist() if call else None
    choice = kernels.choice_of(facts[3]) if facts else None
    errors = [{path: _error(call) for path, call in forward.calls.items()} for forward in attachment.log]
    by_layer = {path: _mean_error(of_forward.get(path) for of_forward in errors) for path in records}
    return TransformerReport(
        component=component,
        family=attachment.family.name,
        config=attachment.config,
        attached=attachment.attached,
        backend=choice.name if choice else None,
        backend_reason=choice.reason if choice else None,
        grid=attachment.last_grid,
        blocks=(facts[1], facts[2]) if facts else None,
        densities={path: _density(record.call, block) if record.call else None for path, record in records.items()},
        errors={path: error for path, error in by_layer.items() if error},
        run=tuple(
            _forward_report(forward, block, of_forward.values())
            for forward, of_forward in zip(attachment.log, errors, strict=True)
        ),
        dense_layers=attachment.dense_layers,
        steps=dict(counts.steps),
        forwards=dict(counts.forwards),
        sparse_calls=counts.calls["sparse"],
        dense_calls={reason: counts.calls[reason] for reason in ("step", "layer", "mask", "replacement")},
        skipped_calls=counts.calls["skipped"],
        skipped_forwards=counts.skipped_forwards,
    )


def _forward_report(forward: SparseForward, block: int, errors: Iterable[Error | None]) -> ForwardReport:
    density = _mean([_density(call, block) for call in forward.calls.values()])
    return ForwardReport(forward.step.number, 1 - forward.step.sparsity, density, _mean_error(errors))


def _density(call: SparseCall, block: int) -> float:
    heads, blocks = call.facts.tolist()[:2]
    valid = [blocks] * len(call.pairs)
    if call.kv_len is not None:
        valid = [-(-length // block) for length in call.kv_len.tolist()]
    return int(call.pairs.sum()) / (sum(valid) * heads * blocks)


def _error(call: SparseCall) -> Error | None:
    before, after, whole = call.squares.tolist()
    return Error(math.sqrt(before / whole), math.sqrt(after / whole)) if whole > 0 else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _mean_error(errors: Iterable[Error | None]) -> Error | None:
    known = [error for error in errors if error]
    if not known:
        return None
    return Error(_mean([error.before for error in known]), _mean([error.after for error in known]))


def _why(reason: str | None) -> str:
    return f" ({reason})" if reason else ""
