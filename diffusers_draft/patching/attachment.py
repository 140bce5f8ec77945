"""Puts draft attention into a transformer: how its layers get our attention, and how a forward learns its grid."""

import contextlib
import math
import sys
import warnings
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..attention import kernels
from ..config import DraftConfig
from ..families.family import Family, Inputs, VideoTokens, inputs_of
from .clock import Clock
from .feedback import Reading
from .forward import Forward, Hook, check_not_exporting
from .processors import PatchedLayers
from .schedule import Schedule
from .shadow import Shadow
from .splitting import originals_of, share
from .stock_when_copied import StockWhenCopied
from .tally import Tally
from .turn import calls_of

_shadows: weakref.WeakKeyDictionary[nn.Module, Shadow] = weakref.WeakKeyDictionary()
"""Of every transformer that was ever patched, for its life."""


OUTSIDE = (
    "Draft attention learns the grid in this hook, outside of any graph. Compile the transformer itself, not a "
    "function around it, and disable draft attention before it is exported."
)
"""Said by `torch.compile` and `torch.export` where they meet the hook."""


class Attachment(StockWhenCopied):
    """Draft attention in one transformer with one group of settings: its hooks and its layers.

    Args:
        transformer: of a known family.
        family: this one.
        config: the settings.
        clock: tells the moment of a forward.
        schedule: says which are dense.
        sparse_layers: module paths of the layers to patch.
        dense_layers: module paths of the layers left alone.

    Attributes:
        tally: what happened so far.
        given_up: whether whoever asked for these settings no longer wants them.
        last_grid: `(T, Y, X)` tokens of the last forward.
    """

    def __init__(
        self,
        transformer: nn.Module,
        family: Family,
        config: DraftConfig,
        clock: Clock,
        schedule: Schedule,
        sparse_layers: tuple[str, ...],
        dense_layers: tuple[str, ...],
    ) -> None:
        kernels.check_backend(config.backend)
        self.transformer = weakref.ref(transformer)
        self.family = family
        self.config = config
        self.clock = clock
        self.schedule = schedule
        self.dense_layers = dense_layers
        self.tally = Tally(sparse_layers, len(dense_layers))
        self.given_up = False
        self.last_grid: tuple[int, int, int] | None = None
        self._shadow = _shadows.setdefault(transformer, Shadow(family))
        self._layers: PatchedLayers | None = None
        self._hook: Hook | None = None
        self._handles: list[Any] = []

    @property
    def forward(self) -> Forward:
        """What the transformer's forwards leave for its layers."""
        return self._shadow.forward

    @property
    def attached(self) -> bool:
        """Whether these settings are in force."""
        return bool(self._handles)

    def attach(self) -> None:
        """Put the processors and the hooks in place, or nothing if any of it fails."""
        transformer = self.transformer()
        assert transformer is not None, "the transformer is held by the caller"
        originals = originals_of(transformer, tuple(self.tally.records))
        if self._layers is None or self._layers.originals != originals:
            self._layers = PatchedLayers(transformer, originals, self._shadow, self.tally.records)
        try:
            self._layers.put()
            self._shadow.stop_waiting(self._layers.modules())
            self._handles.append(transformer.register_forward_pre_hook(self, with_kwargs=True))
            self._handles.append(transformer.register_forward_hook(_End(self), always_call=True))
        except BaseException:
            self.detach()
            raise
        self.forward.attached = True
        self.forward.method = self.config.method.to_tensor()
        self.forward.paths = frozenset(self.tally.records)
        self.forward.hook = self._hook

    def detach(self) -> None:
        """Restore every stock processor that is still replaced by ours. Harmless when done twice."""
        attached = self.attached
        if attached:
            # Whoever keeps one of our processors and puts it back gets dense attention.
            self.forward.attached = self.forward.sparse = False
            self.forward.hook = None
        while self._handles:
            self._handles.pop().remove()
        if self._layers is not None:
            self._layers.take_back()
            if attached:
                self._shadow.await_backward(self._layers.modules())

    @contextlib.contextmanager
    def watched(self, hook: Hook) -> Iterator[None]:
        """Show every call of the patched layers to a hook, which may stand in for it."""
        before, self._hook = self._hook, hook
        if self.attached:
            self.forward.hook = hook
        try:
            yield
        finally:
            self._hook = before
            if self.attached:
                self.forward.hook = before

    # `torch.compile` calls a module's hooks outside the graph of its forward, so this one may simply stay eager.
    @torch.compiler.disable(reason=OUTSIDE)
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Learn the grid and the lengths, decide dense or sparse, and count: the forward pre-hook.

        Raises:
            RuntimeError: if the forward is exported or traced.
        """
        check_not_exporting()
        self.forward.begin(module)
        try:
            if not self.attached:  # another thread has disabled it, or put others in its place, while this one waited
                self._give_way(module, args, kwargs)
                return
            self._learn(module, args, kwargs)
        except BaseException:
            self.forward.end()
            self.forward.leave()
            raise
        # Behind all other hooks: the forward is not over while they run.
        hooks: Any = module._forward_hooks
        hooks.move_to_end(self._handles[-1].id)

    def _give_way(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Leave the forward that begins to the settings that are in force by now, or to stock attention."""
        if others := attachment_of(module):
            self.forward.end()
            others(module, args, kwargs)
        else:  # it keeps its turn: nobody is to enable anything in the middle of it
            _StockEnd(self.forward, module)

    def _learn(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        forward, inputs = self.forward, inputs_of(module, args, kwargs)
        if "timestep" not in inputs:
            raise TypeError(
                f"{type(module).__name__} was called with {', '.join(inputs)}, and without an argument named "
                "timestep. Draft attention finds the video in the arguments by the names of diffusers' class."
            )
        repeated = forward.repeat(inputs["timestep"])
        video = self._locate(module, inputs)
        forward.geometry = torch.tensor([*video.grid, video.prefix], device="cpu")
        assert self._layers is not None, "attached"
        share(forward, module, self.family, self._layers.processors, inputs, video)
        forward.kv_len = video.kv_len
        if repeated:
            forward.remember(inputs["timestep"])
            return
        moment = self.clock.at(inputs["timestep"])
        step = self.schedule.at(moment, inputs["timestep"], min(1.0, self.config.block / math.prod(video.grid)))
        self.clock.note(moment)
        forward.sparse = step is not None
        if step:
            forward.numbers = torch.tensor([step.sparsity, step.number], dtype=torch.float64, device="cpu")
        self.tally.begin(forward.depth, moment, step, self._look_for_replaced(module))
        self.last_grid = video.grid
        forward.remember(inputs["timestep"])

    def _locate(self, module: nn.Module, inputs: Inputs) -> VideoTokens:
        try:
            return self.family.video(inputs, module.config)
        except KeyError as missing:
            raise TypeError(f"{type(module).__name__} was called without the argument {missing}.") from missing

    def end(self, output: Any) -> None:
        """Count the calls of the forward that is over, and let the schedule learn what they measured."""
        try:
            if self.forward.end(output):  # not if it failed before it began, or was no new one
                ranks = self.forward.ranks if self.config.probes else None
                sparse = self.tally.end(failed=output is None, ranks=ranks)
                if sparse and sparse.mostly_ran and sparse.step.asked:
                    sparse.step.asked.readings.append(Reading(call.squares for call in sparse.calls.values()))
        finally:
            self.forward.leave()

    def _look_for_replaced(self, transformer: nn.Module) -> int:
        """Count the layers whose processor somebody has replaced since. They run dense."""
        assert self._layers is not None, "attached"
        replaced = self._layers.replaced()
        if replaced and self.forward.sparse and not self.tally.counts.calls["replacement"]:
            found = type(replaced[0]).__name__
            warnings.warn(
                f"{len(replaced)} attention layers of {type(transformer).__name__} lost draft attention: something "
                f"put {found} in its place. They run without it. Undo that, or enable draft attention again.",
                stacklevel=2,
            )
        return len(replaced)


class _End(StockWhenCopied):
    """The forward hook: notes that the forward is over, also after an error."""

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._attachment.end(output)


class _StockEnd(StockWhenCopied):
    """The forward hook of one forward with stock attention that had taken its turn."""

    def __init__(self, forward: Forward, module: nn.Module) -> None:
        self._forward = forward
        self._handle = module.register_forward_hook(self, always_call=True)

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._forward.turn.is_held_here:
            self._handle.remove()
            self._forward.end()
            self._forward.leave()


def attachment_of(transformer: nn.Module) -> Attachment | None:
    """Find the settings that are in force in a transformer."""
    hooks = transformer._forward_pre_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, Attachment)), None)


@contextlib.contextmanager
def paused(attachments: Iterable[Attachment]) -> Iterator[None]:
    """Keep other threads out of the transformers while settings change, once they have left them."""
    with contextlib.ExitStack() as stack:
        for attachment in sorted(attachments, key=lambda attachment: id(attachment.forward)):
            if (transformer := attachment.transformer()) is not None:
                stack.enter_context(attachment.forward.turn.paused(transformer))
        yield


def check_not_running(transformer: nn.Module | None) -> None:
    """Raise RuntimeError if this thread is in a forward of a patched transformer."""
    if transformer is not None and attachment_of(transformer) and calls_of(transformer, sys._getframe()):
        raise RuntimeError(
            f"A forward of {type(transformer).__name__} is running. Enable or disable draft attention between "
            "forwards, for example in callback_on_step_end."
        )
