"""Measures draft attention call by call, on the queries, keys and values of a dense run."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ...api import enable_draft_attention
from ...attention import kernels
from ...attention.steps import plain
from ...patching.dispatch import attending
from .mass import block_mass
from .replacement import ordered_call
from .selection import SELECTIONS, Call, chosen
from .settings import Setting

Measured = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Samples:
    """How many layers, steps and heads to look at, spread evenly over the model and the run."""

    layers: int = 4
    steps: int = 3
    heads: int = 4


def measure_attention(
    pipe: Any, arguments: dict[str, Any], settings: Sequence[Setting], samples: Samples, seed: int
) -> dict[Setting, list[Measured]]:
    """Runs the pipeline dense and measures every setting in the sampled calls, each step's first forward.

    Args:
        pipe: the pipeline.
        arguments: of its call.
        settings: what to measure.
        samples: which calls.
        seed: of random selections.

    Returns:
        For every setting one dict for each sampled head of each call: `component`, `layer`, `step`, `head`, `error`
        (relative, of the video tokens' output), `kept` and `oracle` (shares of the video queries' attention mass).

    Raises:
        ValueError: if the video has not even a block of tokens.
    """
    watch = _Watch(pipe, settings, samples, seed)
    with enable_draft_attention(pipe, 0, dense_steps=0, dense_layers=()) as handle, attending(watch.attend):
        layers = {report.component: list(report.densities) for report in handle.report().transformers}
        hooks = watch.hooks(layers)
        try:
            pipe(**arguments, output_type="latent", callback_on_step_end=watch.on_step_end)
        finally:
            for hook in hooks:
                hook.remove()
    return watch.measured


class _Watch:
    """Knows which call of the run this is, and measures those that are sampled."""

    def __init__(self, pipe: Any, settings: Sequence[Setting], samples: Samples, seed: int) -> None:
        self.pipe = pipe
        self.settings = settings
        self.samples = samples
        self.generator = torch.Generator().manual_seed(seed)
        self.measured: dict[Setting, list[Measured]] = {setting: [] for setting in settings}
        self.step = 0
        self.forwards: defaultdict[int, int] = defaultdict(int)
        self.place: tuple[str, str] | None = None

    def hooks(self, layers: dict[str, list[str]]) -> list[Any]:
        """Hooks that tell which sampled layer of which component runs."""
        made = []
        for component, paths in layers.items():
            transformer = self.pipe.components[component]
            made.append(transformer.register_forward_pre_hook(self._on_forward))
            for index in spread(self.samples.layers, len(paths)):
                module = transformer.get_submodule(paths[index])
                place = (component, paths[index])
                made.append(module.register_forward_pre_hook(lambda *_, place=place: self._enter(place)))
                made.append(module.register_forward_hook(lambda *_: self._enter(None)))
        return made

    def on_step_end(self, pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        self.step = step + 1
        return {}

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, geometry: Tensor, kv_len: Tensor | None, config: Any,
        scale: float | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out = _dense(query, key, value, kv_len, scale)
        first = self.forwards[self.step] == 1
        if self.place and first and self.step in spread(self.samples.steps, self.pipe.num_timesteps):
            heads = spread(self.samples.heads, query.shape[2])
            q, k, v, dense = (tensor[:, :, heads] for tensor in (query, key, value, out))
            component, layer = self.place
            where = {"component": component, "layer": layer, "step": self.step}
            for setting in self.settings:
                found = measure_call(q, k, v, dense, geometry, kv_len, scale, setting, self.generator)
                self.measured[setting] += [
                    where | {"head": head} | row for head, row in zip(heads, found, strict=True)
                ]
        return out, query.new_zeros((query.shape[0], query.shape[2], 1), dtype=torch.int32)

    def _on_forward(self, *_: Any) -> None:
        self.forwards[self.step] += 1

    def _enter(self, place: tuple[str, str] | None) -> None:
        self.place = place


def measure_call(
    query: Tensor, key: Tensor, value: Tensor, dense: Tensor, geometry: Tensor, kv_len: Tensor | None,
    scale: float | None, setting: Setting, generator: torch.Generator,
) -> list[dict[str, float]]:  # fmt: skip
    """Measures one setting in one call.

    Args:
        query: `(B, S, H, D)`.
        key: as `query`.
        value: as `query`.
        dense: as `query`, the output of dense attention.
        geometry: `(4,)` T, Y, X and the prefix.
        kv_len: `(B,)` leading valid keys or None.
        scale: factor on the scores, or None.
        setting: what to measure.
        generator: source of random selections.

    Returns:
        `error`, `kept` and `oracle` for each head, means over the batch.

    Raises:
        ValueError: if the video has not even a block of tokens.
    """
    config = setting.config
    call = ordered_call(query, key, geometry, kv_len, config, scale, generator)
    if not call.layout.num_video_blocks:
        raise ValueError(f"The video has fewer tokens than a block of {call.layout.block}: nothing is sparse.")
    mask = chosen(SELECTIONS[setting.selection](call), call, config)
    kernel = kernels.choose(config.backend, query.device, query.dtype, query.shape[-1], call.layout.block)
    ordered_value, _ = plain.order(value, call.layout, average=False)
    out = plain.restore(kernel.forward(call.query, call.key, ordered_value, mask, call.scale), call.layout)
    mass = block_mass(call.query, call.key, call.layout.num_video_blocks, call.layout.block, call.scale, kv_len)
    best = chosen(mass[..., : mass.shape[2]], call, config)
    columns = (_error(out, dense, call), _kept(mass, mask), _kept(mass, best))
    return [{"error": error, "kept": kept, "oracle": most} for error, kept, most in zip(*columns, strict=True)]


def spread(count: int, total: int) -> list[int]:
    """At most `count` indices below `total`, evenly spaced, none of them at an end if there are more."""
    count = min(count, total)
    return [int((index + 0.5) * total / count) for index in range(count)]


def _dense(query: Tensor, key: Tensor, value: Tensor, kv_len: Tensor | None, scale: float | None) -> Tensor:
    """Dense attention of `(B, S, H, D)` tensors to the valid keys of each sample."""
    lengths = [key.shape[1]] * len(key) if kv_len is None else kv_len.tolist()
    samples = []
    for sample, length in enumerate(lengths):
        q, k, v = query[sample], key[sample, :length], value[sample, :length]
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, scale=scale)
        samples.append(out.transpose(1, 2))
    return torch.cat(samples)


def _error(out: Tensor, dense: Tensor, call: Call) -> list[float]:
    frames, rows, columns = call.grid
    video = slice(call.prefix, call.prefix + frames * rows * columns)
    difference = (out - dense).float()[:, video].square().sum((1, 3)).sqrt()
    return (difference / dense.float()[:, video].square().sum((1, 3)).sqrt()).mean(0).tolist()


def _kept(mass: Tensor, mask: Any) -> list[float]:
    """The share of the attention mass in the kept blocks, mean over samples and video queries, for each head."""
    return (mass * mask.to_dense()[:, :, : mass.shape[2]]).sum(-1).mean((0, 2)).tolist()
