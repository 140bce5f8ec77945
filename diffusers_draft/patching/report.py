"""What really happened: a report made from what the hot path left behind, only when it is asked for."""

import math
from dataclasses import dataclass

import torch

from ..attention import kernels
from ..attention.block_mask import density
from ..config import DraftConfig
from .attachment import Attachment


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
    """Reads the counters; waits for the device to fetch the densities."""
    state, config = attachment.state, attachment.config
    frames, rows, columns, _ = state.geometry.tolist()
    counts = (processor.kv_num_blocks for processor in attachment.processors.values())
    measured = next((count for count in counts if count is not None), None)
    choice = blocks = None
    if measured is not None and state.kind is not None:
        dtype, head_dim, needs_grad = state.kind
        choice = kernels.choose(config.backend, measured.device, dtype, head_dim, config.block, needs_grad)
        blocks = (measured.shape[-1], math.prod(attachment.last_sparse or (0,)) // config.block)
    forwards = attachment.forwards
    return TransformerReport(
        component=component,
        family=attachment.family.name,
        config=config,
        attached=attachment.attached,
        backend=choice.name if choice else None,
        backend_reason=choice.reason if choice else None,
        grid=(frames, rows, columns) if frames else None,
        blocks=blocks,
        densities={
            path: _density(p.kv_num_blocks, p.kv_len, config.block) for path, p in attachment.processors.items()
        },
        dense_layers=attachment.dense_layers,
        steps=dict(attachment.steps),
        forwards=dict(forwards),
        dense_calls={
            "step": forwards["dense"] * len(attachment.processors),
            "layer": sum(forwards.values()) * len(attachment.dense_layers),
            "mask": attachment.masked_calls + sum(p.masked for p in attachment.processors.values()),
            "replacement": attachment.replaced_calls,
        },
    )


def _density(counts: torch.Tensor | None, kv_len: torch.Tensor | None, block: int) -> float | None:
    if counts is None:
        return None
    batch, _, num_blocks = counts.shape
    if kv_len is None:
        valid = counts.new_full((batch,), num_blocks)
    else:
        valid = (kv_len.to(counts.device) + block - 1) // block
    return float(density(counts, valid))


def _why(reason: str | None) -> str:
    return f" ({reason})" if reason else ""
