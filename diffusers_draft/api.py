"""Enable, report, disable: finds the transformers, checks everything, and only then changes anything."""

import sys
from collections.abc import Iterable
from types import FrameType
from typing import Any

import diffusers
from torch import nn

from .attention.layout import Tile
from .config import Budget, DraftConfig
from .families import Family, families, family_of
from .families.unsupported import reason_against
from .patching.attachment import Attachment, attachment_of
from .patching.layers import processors_of, stock_class
from .patching.processors import can_be_patched
from .patching.report import DraftReport, report_on
from .patching.schedule import Schedule
from .patching.splitting import check_layers


class DraftHandle:
    """Draft attention in a pipeline or transformer; also a context manager that disables it on exit.

    Attributes:
        config: the settings in force.
    """

    def __init__(self, config: DraftConfig, attachments: dict[str, Attachment]) -> None:
        self.config = config
        self._attachments = attachments

    def report(self) -> DraftReport:
        """Says what happened so far: density, layers, steps, backend. Waits for the device."""
        return DraftReport(tuple(report_on(name, attachment) for name, attachment in self._attachments.items()))

    def disable(self) -> None:
        """Restores the stock attention bit for bit. Harmless when done twice or after enabling again.

        Raises:
            RuntimeError: if called while a forward of the transformer is running.
        """
        for attachment in self._attachments.values():
            check_not_running(attachment.transformer())
        for attachment in self._attachments.values():
            attachment.detach()

    def __enter__(self) -> "DraftHandle":
        return self

    def __exit__(self, *exception: object) -> None:
        self.disable()


def enable_draft_attention(
    pipe: Any,
    sparsity: float = 0.9,
    *,
    budget: Budget = DraftConfig.budget,
    tile: Tile = DraftConfig.tile,
    dense_steps: float | None = None,
    dense_timestep: float | None = None,
    dense_layers: Iterable[int] | None = None,
    backend: str = "auto",
    config: DraftConfig | None = None,
) -> DraftHandle:
    """Makes the video self-attention of a pipeline block-sparse, in place (DraftAttention, arXiv 2505.14708).

    Enabling again replaces the settings. Nothing is added to the model's parameters, state dict or config.

    Args:
        pipe: a diffusers pipeline, modular pipeline or transformer. All transformers of a pipeline are patched.
        sparsity: share of the video block pairs to skip, in [0, 1).
        budget: `"row"` or `"head"`, see `DraftConfig`.
        tile: `(h, w)` or `(t, h, w)` tokens of a block, see `DraftConfig`.
        dense_steps: share of the run's steps, from its start, that stay dense.
        dense_timestep: steps whose timestep is above this stay dense; by default what the paper's code does.
        dense_layers: indices of self-attention layers that stay dense; by default what the paper's code does.
        backend: `"auto"` or a name from `diffusers_draft.attention.kernels.BACKENDS`.
        config: all settings in one object, instead of the arguments above.

    Returns:
        A handle with `report()` and `disable()`.

    Raises:
        TypeError: if `pipe` has no transformer that draft attention knows; the message lists those it knows, or
            says why draft attention does not apply.
        ValueError: if an option is out of range, the model's config makes its attention something else, or an
            attention layer has a processor that is not the stock one.
        ImportError: if the chosen backend's package is missing.
        NotImplementedError: under ring attention, or when the model is split over GPUs in a way that draft attention
            cannot follow; the message says what to do.
        RuntimeError: if called while a forward of the transformer is running.
    """
    given = DraftConfig(
        sparsity=sparsity,
        budget=budget,
        tile=tile,
        dense_steps=dense_steps,
        dense_timestep=dense_timestep,
        dense_layers=dense_layers,
        backend=backend,
    )
    if config is not None and given != DraftConfig():
        raise ValueError("Pass either config or single options, not both.")
    config = config or given

    found = known_transformers(pipe)
    schedules: dict[str, Schedule] = {}
    attachments = {}
    for name, (transformer, family) in found.items():
        check_not_running(transformer)
        family.check(transformer.config)
        if family.name not in schedules:
            schedules[family.name] = _schedule(pipe, family, config)
        sparse, dense = _layers(transformer, family, config)
        attachments[name] = Attachment(transformer, family, config, schedules[family.name], sparse, dense)

    replaced = [old for transformer, _ in found.values() if (old := attachment_of(transformer))]
    for old in replaced:
        old.detach()
    try:
        for attachment in attachments.values():
            attachment.attach()
    except BaseException:
        for attachment in attachments.values():
            attachment.detach()
        for old in replaced:
            old.attach()
        raise
    return DraftHandle(config, attachments)


def disable_draft_attention(pipe: Any) -> None:
    """Restores the stock attention of a pipeline or transformer bit for bit. Harmless if it is not patched.

    Args:
        pipe: what was given to `enable_draft_attention`.

    Raises:
        TypeError: if `pipe` has no transformer that draft attention knows.
        RuntimeError: if called while a forward of the transformer is running.
    """
    transformers = [transformer for transformer, _ in known_transformers(pipe).values()]
    for transformer in transformers:
        check_not_running(transformer)
    for transformer in transformers:
        if attachment := attachment_of(transformer):
            attachment.detach()


def known_transformers(pipe: Any) -> dict[str, tuple[nn.Module, Family]]:
    """The known transformers in a pipeline, or the one that was given, by component name."""
    components = {"transformer": pipe} if isinstance(pipe, nn.Module) else getattr(pipe, "components", None)
    if not isinstance(components, dict):
        raise TypeError(f"Expected a diffusers pipeline or transformer, got {type(pipe).__name__}.")
    modules = {
        name: getattr(component, "_orig_mod", component)  # torch.compile(transformer) wraps it
        for name, component in components.items()
        if isinstance(component, nn.Module)
    }
    found: dict[str, tuple[nn.Module, Family]] = {}
    for name, module in modules.items():
        family = family_of(module)
        if family and all(module is not other for other, _ in found.values()):
            found[name] = (module, family)
    if not found:
        for module in modules.values():
            if reason := reason_against(module):
                raise TypeError(f"Draft attention does not apply to {type(module).__name__}: {reason}.")
        candidates = [type(module).__name__ for name, module in modules.items() if "transformer" in name]
        raise TypeError(
            f"Draft attention does not know {', '.join(candidates) or type(pipe).__name__}. "
            f"It knows {', '.join(families())}."
        )
    return found


def _schedule(pipe: Any, family: Family, config: DraftConfig) -> Schedule:
    """The schedule that was asked for, or else the family's."""
    if config.dense_steps is not None or config.dense_timestep is not None:
        share, limit = config.dense_steps, config.dense_timestep
    else:
        share, limit = family.dense_steps if hasattr(pipe, "scheduler") else None, None
    limit = family.dense_timestep if limit is None else limit
    return Schedule(pipe, share, limit, scheduler_units=family.scheduler_units)


def _layers(transformer: nn.Module, family: Family, config: DraftConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Module paths of the layers to make sparse, and of those that stay dense."""
    paths = layer_paths(transformer, family.layers)
    if config.dense_layers is None:
        dense = set(family.dense_layers)
    else:
        wrong = [index for index in config.dense_layers if index >= len(paths)]
        if wrong:
            raise ValueError(f"dense_layers has {wrong}, but {type(transformer).__name__} has {len(paths)} layers.")
        dense = {paths[index] for index in config.dense_layers}
    processors = processors_of(transformer, paths)
    for path, processor in processors.items():
        if not _is_stock(processor, family):
            raise ValueError(
                f"Layer {path} of {type(transformer).__name__} has the processor {type(processor).__name__}, but "
                f"draft attention needs diffusers' own {' or '.join(family.processors)}. Undo what replaced it first."
            )
        if not can_be_patched(stock_class(processor), family):
            raise ValueError(
                f"The code of {type(processor).__name__} in diffusers {diffusers.__version__} ends in no attention "
                "call that draft attention knows. Use a version of diffusers that it was tested with."
            )
    check_layers(transformer, family, processors)
    return tuple(path for path in paths if path not in dense), tuple(path for path in paths if path in dense)


def _is_stock(processor: Any, family: Family) -> bool:
    stock = stock_class(processor)
    return stock.__module__.startswith("diffusers.") and stock.__name__ in family.processors


def layer_paths(transformer: nn.Module, patterns: tuple[str, ...]) -> tuple[str, ...]:
    """`"blocks.*.attn1"` -> `"blocks.0.attn1"`, `"blocks.1.attn1"`, ..."""
    found = []
    for blocks, layer in (pattern.split(".*.") for pattern in patterns):
        found += [f"{blocks}.{name}.{layer}" for name, _ in transformer.get_submodule(blocks).named_children()]
    return tuple(found)


def check_not_running(transformer: nn.Module | None) -> None:
    frame: FrameType | None = sys._getframe()
    while frame := frame and frame.f_back:
        # Only torch's own frames are looked into: `f_locals` would keep a caller's variables alive.
        if frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals["self"] is transformer:
            raise RuntimeError(
                f"A forward of {type(transformer).__name__} is running. Enable or disable draft attention between "
                "forwards, for example in callback_on_step_end."
            )
