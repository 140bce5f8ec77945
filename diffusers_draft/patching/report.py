"""What really happened: a report made from what the hot path left behind, only when it is asked for."""

from dataclasses import dataclass

from ..attention import kernels
from ..config import DraftConfig
from .attachment import Attachment
from .forward import LayerRecord


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
        densities: for each sparse layer, by module path, the share of block pairs its last sparse call computed;
            None if it has not run sparse yet.
        dense_layers: module paths of the layers left dense.
        steps: denoising steps so far that were `"dense"` and `"sparse"`.
        forwards: transformer forwards so far, likewise (more than steps with classifier-free guidance).
        dense_calls: attention calls that ran dense, by reason: `"step"`, `"layer"`, `"mask"` (the model passed a
            mask that draft attention cannot honour) and `"replacement"` (something replaced our processor).
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
    dense_layers: tuple[str, ...]
    steps: dict[str, int]
    forwards: dict[str, int]
    dense_calls: dict[str, int]

    @property
    def density(self) -> float | None:
        """Mean density of the layers that have run sparse."""
        measured = [value for value in self.densities.values() if value is not None]
        return sum(measured) / len(measured) if measured else None

    def __str__(self) -> str:
        state = "" if self.attached else " (disabled)"
        lines = [f"{self.component}{state}: {self.family}, sparsity {self.config.sparsity:g} by {self.config.budget}"]
        lines.append(f"  backend   {self.backend or 'not chosen yet'}" + _why(self.backend_reason))
        if self.grid:
            lines.append(f"  grid      {self.grid} = {self.grid[0] * self.grid[1] * self.grid[2]:,} video tokens")
        if self.blocks:
            total, video = self.blocks
            lines.append(f"  blocks    {total} of {self.config.block} tokens, {video} of them video")
        if self.density is None:
            lines.append("  density   no sparse call yet")
        else:
            values = [value for value in self.densities.values() if value is not None]
            lines.append(f"  density   {self.density:.3f} (layers from {min(values):.3f} to {max(values):.3f})")
        lines.append(f"  layers    {len(self.densities)} sparse, {len(self.dense_layers)} dense")
        lines.append(f"  steps     {self.steps['sparse']} sparse, {self.steps['dense']} dense")
        dense = ", ".join(f"{count} by {reason}" for reason, count in self.dense_calls.items() if count)
        lines.append(f"  dense     {dense or 'no call'}")
        return "\n".join(lines)


@dataclass(frozen=True)
class DraftReport:
    """The reports of all patched transformers of a pipeline."""

    transformers: tuple[TransformerReport, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.transformers))


def report_on(component: str, attachment: Attachment) -> TransformerReport:
    """Read the counters; wait for the device to fetch the densities."""
    records = attachment.records
    facts = next((record.facts.tolist() for record in records.values() if record.facts is not None), None)
    forwards = attachment.forwards
    choice = kernels.choice_of(facts[3]) if facts else None
    return TransformerReport(
        component=component,
        family=attachment.family.name,
        config=attachment.config,
        attached=attachment.attached,
        backend=choice.name if choice else None,
        backend_reason=choice.reason if choice else None,
        grid=attachment.last_grid,
        blocks=(facts[1], facts[2]) if facts else None,
        densities={path: _density(record, attachment.config.block) for path, record in records.items()},
        dense_layers=attachment.dense_layers,
        steps=dict(attachment.steps),
        forwards=dict(forwards),
        dense_calls={
            "step": forwards["dense"] * len(records),
            "layer": sum(forwards.values()) * len(attachment.dense_layers),
            "mask": attachment.masked_calls + sum(record.masked for record in records.values()),
            "replacement": attachment.replaced_calls,
        },
    )


def _density(record: LayerRecord, block: int) -> float | None:
    if record.pairs is None or record.facts is None:
        return None
    heads, blocks = record.facts.tolist()[:2]
    valid = [blocks] * len(record.pairs)
    if record.kv_len is not None:
        valid = [-(-length // block) for length in record.kv_len.tolist()]
    return int(record.pairs.sum()) / (sum(valid) * heads * blocks)


def _why(reason: str | None) -> str:
    return f" ({reason})" if reason else ""
