"""Errors of draft attention in single attention calls, on queries, keys and values of a dense run."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...api import enable_draft_attention
from ...attention.call import Call
from ...attention.ops import attended
from ...attention.steps.plain import attend_to_valid
from ...families.family import inputs_of
from ...patching.clock import Clock
from ...patching.forward import AttentionCall
from .mass import block_mass
from .selection import SELECTIONS
from .settings import Setting

Measured = dict[str, Any]
"""Results of one head in one call, by name."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Number of layers, steps and heads to sample, spread evenly over the model and the run."""

    layers: int = 4
    steps: int = 3
    heads: int = 4


def measure_attention(
    pipe: Any, arguments: dict[str, Any], settings: Sequence[Setting], samples: Samples, seed: int
) -> dict[Setting, list[Measured]]:
    """Run the pipeline dense and measure every setting in sampled calls of each sampled step's first forward.

    Args:
        pipe: the pipeline.
        arguments: keyword arguments of the pipeline's call.
        settings: the settings to measure.
        samples: the number of calls to sample.
        seed: seed of random selections.

    Returns:
        For every setting one dict for each sampled head of each call: `component`, `layer`, `step`, `head`, `error`
        (relative, of the video tokens' output), `kept` and `oracle` (shares of the video queries' attention mass).

    Raises:
        ValueError: if the video has fewer tokens than a block, or nothing tells the steps of the run.
    """
    with enable_draft_attention(pipe, 0, dense_steps=0, dense_layers=()) as handle:
        layers = {report.component: list(report.densities) for report in handle.report().transformers}
        watch = _Watch(layers, settings, samples, seed)
        hooks = [
            pipe.components[name].register_forward_pre_hook(watch.forward_of(name, attachment.clock), with_kwargs=True)
            for name, attachment in handle._attachments.items()
        ]
        try:
            with handle._watched(watch.attend):
                pipe(**arguments, output_type="latent")
        finally:
            for hook in hooks:
                hook.remove()
    return watch.measured


class _Watch:
    """Hook that attends densely in all calls of a run and measures the sampled ones."""

    def __init__(self, layers: dict[str, list[str]], settings: Sequence[Setting], samples: Samples, seed: int) -> None:
        self.layers = {
            name: [paths[index] for index in spread(samples.layers, len(paths))] for name, paths in layers.items()
        }
        self.settings = settings
        self.samples = samples
        self.generator = torch.Generator().manual_seed(seed)
        self.measured: dict[Setting, list[Measured]] = {setting: [] for setting in settings}
        self.step = self.steps = 0
        self.forwards: defaultdict[int, int] = defaultdict(int)
        self.component = ""

    def forward_of(self, component: str, clock: Clock) -> Callable[..., None]:
        """Make a forward pre-hook that records which component runs, and in which step."""

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            moment = clock.at(inputs_of(module, args, kwargs)["timestep"])
            if moment is None:
                raise ValueError("Nothing tells the steps of this pipeline's run: its attention cannot be measured.")
            self.component = component
            self.step, self.steps = moment.step - moment.begin, len(moment.timesteps) - moment.begin
            self.forwards[self.step] += 1

        return note

    def attend(self, call: AttentionCall) -> Tensor:
        """Attend densely, and measure every setting if the call is sampled."""
        out = attend_to_valid(call.query, call.key, call.value, call.kv_len, call.scale)
        sampled = call.path in self.layers[self.component] and self.forwards[self.step] == 1
        if sampled and self.step in spread(self.samples.steps, self.steps):
            heads = spread(self.samples.heads, call.query.shape[2])
            q, k, v, dense = (tensor[:, :, heads] for tensor in (*call[:3], out))
            where = {"component": self.component, "layer": call.path, "step": self.step}
            for setting in self.settings:
                with torch.accelerator.device_index(q.device.index):  # on which kernels run
                    found = measure_call(
                        q, k, v, dense, call.geometry, call.kv_len, call.scale, setting, self.generator
                    )
                self.measured[setting] += [
                    where | {"head": head} | row for head, row in zip(heads, found, strict=True)
                ]
        return out


def measure_call(
    query: Tensor, key: Tensor, value: Tensor, dense: Tensor, geometry: Tensor, kv_len: Tensor | None,
    scale: float | None, setting: Setting, generator: torch.Generator,
) -> list[dict[str, float]]:  # fmt: skip
    """Measure one setting in one call, at its mean sparsity whatever the step: the schedule is left out.

    Args:
        query: `(B, S, H, D)`.
        key: as `query`.
        value: as `query`.
        dense: as `query`, the output of dense attention.
        geometry: `(4,)` T, Y, X and the prefix.
        kv_len: `(B,)` leading valid keys or None.
        scale: factor on the scores, or None.
        setting: the setting to measure.
        generator: source of random selections.

    Returns:
        `error`, `kept` and `oracle` for each head, means over the batch.

    Raises:
        ValueError: if the video has fewer tokens than a block.
    """
    config = setting.config
    call = Call.order(query, key, value, geometry, kv_len, config.method, scale)
    layout = call.layout
    if not layout.num_video_blocks:
        raise ValueError(f"The video has fewer tokens than a block of {layout.block}: nothing is sparse.")
    mask = call.select(config.known_sparsity, SELECTIONS[setting.selection](call, generator))
    out = attended(call, mask, config.known_sparsity).out
    mass = block_mass(call.query, call.key, layout.num_video_blocks, layout.block, call.scale, kv_len)
    best = call.select(config.known_sparsity, mass[..., : mass.shape[2]])
    columns = (_error(out, dense, call), _kept(mass, mask), _kept(mass, best))
    return [{"error": error, "kept": kept, "oracle": most} for error, kept, most in zip(*columns, strict=True)]


def spread(count: int, total: int) -> list[int]:
    """Choose at most `count` indices below `total`, each in the middle of an equal share of them."""
    count = min(count, total)
    return [int((index + 0.5) * total / count) for index in range(count)]


def _error(out: Tensor, dense: Tensor, call: Call) -> list[float]:
    """Compute the relative error of the video tokens' output for each head, mean over samples."""
    start = call.layout.prefix
    video = slice(start, start + math.prod(call.layout.grid))
    difference = (out - dense).float()[:, video].square().sum((1, 3)).sqrt()
    return (difference / dense.float()[:, video].square().sum((1, 3)).sqrt()).mean(0).tolist()


def _kept(mass: Tensor, mask: Any) -> list[float]:
    """Compute the share of attention mass in the kept blocks for each head, mean over samples and video queries."""
    return (mass * mask.to_dense()[:, :, : mass.shape[2]]).sum(-1).mean((0, 2)).tolist()
