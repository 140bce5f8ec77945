"""The public verbs: enable, report, disable. Everything is checked before anything is changed."""

import contextlib
import weakref
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from .attention.layout import Tile
from .attention.method import Budget, Score
from .config import DraftConfig, ScheduleName
from .patching.attachment import Attachment, attachment_of, check_not_running, paused
from .patching.clock import Clock
from .patching.components import components_of, warn_of_dense_components
from .patching.forward import Hook
from .patching.parallel import enable_parallelism
from .patching.report import DraftReport, report_on
from .patching.schedule import Schedule, schedule_for
from .patching.targets import choose_layers, known_transformers

__all__ = ["DraftHandle", "disable_draft_attention", "enable_draft_attention", "enable_parallelism"]


class DraftHandle:
    """Draft attention in a pipeline or transformer; also a context manager.

    Leaving the context restores what enabling replaced: the stock attention, or the settings of an outer context. It
    changes nothing if something else has replaced or disabled these settings meanwhile. Entering it when that has
    happened is a `RuntimeError`.

    Attributes:
        config: the settings in force.
    """

    def __init__(
        self, pipe: Any, config: DraftConfig, attachments: dict[str, Attachment], replaced: list[Attachment]
    ) -> None:
        self.config = config
        self._pipe = weakref.ref(pipe)
        self._attachments = attachments
        self._replaced = replaced
        self._entered = 0

    def report(self) -> DraftReport:
        """Say what happened so far: density, layers, steps, backend. Waits for the device.

        Warns if the pipeline now has another transformer that runs dense. Nothing of ours is in that one, so that its
        runs cannot tell, and neither the report nor the warning knows of one that came and went between two reports,
        nor of one in a pipeline that is gone or in other pipelines.
        """
        components = components_of(self._pipe())
        warn_of_dense_components(components, self._attachments)
        return DraftReport(
            tuple(report_on(name, attachment, components) for name, attachment in self._attachments.items())
        )

    def settled_sparsity(self) -> float:
        """Compute the mean sparsity that the latest run arrived at: given as `sparsity`, later runs need no feedback.

        A run that stopped before the second of two experts had a step leaves that expert with the run before.

        Raises:
            RuntimeError: if no sparse step ran yet.
        """
        steps = {  # of which each may have one or several forwards
            (name, forward.number): forward.step.sparsity
            for name, attachment in self._attachments.items()
            for forward in attachment.tally.log
        }
        if not steps:
            raise RuntimeError("No sparse step ran yet: run the pipeline once, then ask what sparsity it arrived at.")
        return sum(steps.values()) / len(steps)

    def disable(self) -> None:
        """Restore the stock attention bit for bit. Harmless when done twice or after enabling again.

        Settings belong to the transformer: other threads that run it lose draft attention, too.

        Raises:
            RuntimeError: if called in a forward of the transformer. Those of other threads are waited for.
        """
        _give_up(self._attachments.values())

    @contextlib.contextmanager
    def _watched(self, hook: Hook) -> Iterator[None]:
        """Show every call of the patched layers to a hook, which may stand in for it."""
        with contextlib.ExitStack() as stack:
            for attachment in self._attachments.values():
                stack.enter_context(attachment.watched(hook))
            yield

    def __enter__(self) -> "DraftHandle":
        if not all(attachment.attached for attachment in self._attachments.values()):
            raise RuntimeError(
                "This handle's settings are not in force any more: they were disabled or replaced. Call "
                "enable_draft_attention again and enter the handle that it returns."
            )
        self._entered += 1
        return self

    def __exit__(self, *exception: object) -> None:
        self._entered = max(0, self._entered - 1)
        if self._entered:
            return
        with paused(self._attachments.values()):
            in_force = [attachment.transformer() for attachment in self._attachments.values() if attachment.attached]
            self.disable()
            for old in self._replaced:
                transformer = old.transformer()
                if transformer is not None and not old.given_up and any(transformer is other for other in in_force):
                    old.attach()


def enable_draft_attention(
    pipe: Any,
    sparsity: float | None = None,
    *,
    max_error: float | None = None,
    schedule: ScheduleName = DraftConfig.schedule,
    score: Score = DraftConfig.score,
    probes: int = DraftConfig.probes,
    budget: Budget = DraftConfig.budget,
    tile: Tile = DraftConfig.tile,
    dense_steps: float | None = None,
    dense_timestep: float | None = None,
    dense_layers: Iterable[int] | None = None,
    backend: str = "auto",
    config: DraftConfig | None = None,
) -> DraftHandle:
    """Make the video self-attention of a pipeline block-sparse, in place (DraftAttention, arXiv 2505.14708).

    Enabling again replaces the settings, within a context until it ends. Nothing is added to the model's parameters,
    state dict or config.

    Args:
        pipe: a diffusers pipeline, modular pipeline or transformer. All transformers of a pipeline are patched.
        sparsity: mean share of the pairs of video blocks that a run's sparse steps skip, in [0, 1); 0.8 if neither it
            nor `max_error` is given.
        max_error: the measured error to arrive at, in (0, 1), instead of `sparsity`, see `DraftConfig`.
        schedule: `"falling"`, `"constant"` or `"paper"`, see `DraftConfig`.
        score: `"value"` or `"mass"`, see `DraftConfig`.
        probes: rows of each head that are computed exactly to correct the others; 0 for no correction.
        budget: `"row"` or `"head"`, see `DraftConfig`.
        tile: `(h, w)` or `(t, h, w)` tokens of a block, see `DraftConfig`.
        dense_steps: share of the run's steps, from its start, that stay dense.
        dense_timestep: steps whose timestep is above this stay dense.
        dense_layers: indices of self-attention layers that stay dense.
        backend: `"auto"` or a name from `diffusers_draft.attention.kernels.BACKENDS`.
        config: all settings in one object, instead of the arguments above.

    Returns:
        A handle with `report()` and `disable()`.

    Raises:
        TypeError: if `pipe` has no transformer that draft attention knows; the message lists those it knows, or
            says why draft attention does not apply. If `config` is not a `DraftConfig`.
        ValueError: if an option is out of range, the model's config makes its attention something else, or an
            attention layer has a processor that is not the stock one.
        ImportError: if the chosen backend's package is missing.
        NotImplementedError: under ring attention, or when the model is split over GPUs in a way that draft attention
            cannot follow; the message says what to do.
        RuntimeError: if called in a forward of the transformer. Those of other threads are waited for.
    """
    if config is not None and not isinstance(config, DraftConfig):
        raise TypeError(f"config must be a DraftConfig, got {config!r}. Make one, as in DraftConfig(sparsity=0.8).")
    if isinstance(sparsity, DraftConfig):
        raise TypeError("The second argument is the sparsity, got a DraftConfig. Give it as config=....")
    given = DraftConfig(
        sparsity=sparsity,
        max_error=max_error,
        schedule=schedule,
        score=score,
        probes=probes,
        budget=budget,
        tile=tile,
        dense_steps=dense_steps,
        dense_timestep=dense_timestep,
        dense_layers=dense_layers,
        backend=backend,
    )
    if config is not None and (sparsity is not None or given != DraftConfig()):
        raise ValueError("Pass either config or single options, not both.")
    config = given if config is None else config

    found = known_transformers(pipe)
    clocks: dict[str, tuple[Clock, Schedule]] = {}
    attachments = {}
    for name, (transformer, family) in found.items():
        check_not_running(transformer)
        family.check(transformer.config)
        if family.name not in clocks:
            clock = Clock(pipe, scheduler_units=family.scheduler_units)
            clocks[family.name] = clock, schedule_for(pipe, family, config)
        layers = choose_layers(transformer, family, config)
        attachments[name] = Attachment(transformer, family, config, *clocks[family.name], *layers)

    with paused(attachments.values()):
        replaced = [old for transformer, _ in found.values() if (old := attachment_of(transformer))]
        _replace(replaced, list(attachments.values()))
    return DraftHandle(pipe, config, attachments, replaced)


def _replace(old: list[Attachment], new: list[Attachment]) -> None:
    """Put new settings in the place of old ones, or leave those in force if that fails."""
    for attachment in old:
        attachment.detach()
    try:
        for attachment in new:
            attachment.attach()
    except BaseException:
        for attachment in new:
            attachment.detach()
        for attachment in old:
            attachment.attach()
        raise


def disable_draft_attention(pipe: Any) -> None:
    """Restore the stock attention of a pipeline or transformer bit for bit. Harmless if it is not patched.

    Args:
        pipe: what was given to `enable_draft_attention`. Of a pipeline the transformers that it has now are restored;
            one that it had before is for `DraftHandle.disable`.

    Raises:
        TypeError: if `pipe` has no transformer that draft attention knows.
        RuntimeError: if called in a forward of the transformer. Those of other threads are waited for.
    """
    transformers = [transformer for transformer, _ in known_transformers(pipe).values()]
    _give_up([attachment for transformer in transformers if (attachment := attachment_of(transformer))])


def _give_up(attachments: Collection[Attachment]) -> None:
    """Restore stock attention for good, between forwards."""
    for attachment in attachments:
        check_not_running(attachment.transformer())
    with paused(attachments):
        for attachment in attachments:
            attachment.given_up = True
            attachment.detach()
