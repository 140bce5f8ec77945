"""Puts draft attention into a transformer: how its layers get our attention, and how a forward learns its grid."""

import collections
import contextlib
import math
import sys
import warnings
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from ..attention import kernels
from ..config import DraftConfig
from ..families.family import Family, inputs_of
from .clock import Clock, Moment
from .feedback import Reading
from .forward import Forward, Hook, check_not_exporting
from .processors import PatchedLayers
from .records import Counts, LayerRecord, SparseForward
from .schedule import Schedule, SparseStep
from .shadow import Shadow
from .splitting import originals_of, share
from .stock_when_copied import StockWhenCopied
from .turn import calls_of

_shadows: weakref.WeakKeyDictionary[nn.Module, Shadow] = weakref.WeakKeyDictionary()
"""Of every transformer that was ever patched, for its life."""


OUTSIDE = (
    "Draft attention learns the grid in this hook, outside of any graph. Compile the transformer itself, not a "
    "function around it, and disable draft attention before it is exported."
)
"""Said by `torch.compile` and `torch.export` where they meet the hook."""
MOST_FORWARDS = 512
"""Sparse forwards of a run that are remembered: each holds small tensors of every layer on the device."""


class _Counted(NamedTuple):
    """What was being counted when a forward began within another."""

    step: SparseStep | None
    replaced: int
    ran: dict[str, str]


class Attachment(StockWhenCopied):
    """Draft attention in one transformer with one group of settings: its hooks, its layers and what they counted.

    Args:
        transformer: of a known family.
        family: this one.
        config: the settings.
        clock: tells the moment of a forward.
        schedule: says which are dense.
        sparse_layers: module paths of the layers to patch.
        dense_layers: module paths of the layers left alone.

    Attributes:
        records: of each sparse layer, by module path, in execution order.
        counts: what happened so far.
        log: of the latest run.
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
        self.records = {path: LayerRecord(path) for path in sparse_layers}
        self.counts = Counts()
        self.log: collections.deque[SparseForward] = collections.deque(maxlen=MOST_FORWARDS)
        self.given_up = False
        self.last_grid: tuple[int, int, int] | None = None
        self._last_moment: Moment | None = None
        self._step: SparseStep | None = None
        self._replaced = 0
        self._shadow = _shadows.setdefault(transformer, Shadow(family))
        self._layers: PatchedLayers | None = None
        self._outer: list[_Counted] = []
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
        self._shadow.stop_waiting()
        originals = originals_of(transformer, tuple(self.records))
        if self._layers is None or self._layers.originals != originals:
            self._layers = PatchedLayers(transformer, originals, self._shadow, self.records)
        try:
            self._layers.put()
            self._handles.append(transformer.register_forward_pre_hook(self, with_kwargs=True))
            self._handles.append(transformer.register_forward_hook(_End(self), always_call=True))
        except BaseException:
            self.detach()
            raise
        self.forward.attached = True
        self.forward.method = self.config.method.to_tensor()
        self.forward.hook = self._hook

    def detach(self) -> None:
        """Restore every stock processor that is still replaced by ours. Harmless when done twice."""
        if self.attached:
            # Whoever keeps one of our processors and puts it back gets dense attention.
            self.forward.attached = self.forward.sparse = False
            self.forward.hook = None
        while self._handles:
            self._handles.pop().remove()
        if self._layers is not None:
            self._layers.take_back()
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
        if forward.repeat(inputs["timestep"]):
            forward.remember(inputs["timestep"])
            return
        video = self.family.video(inputs, module.config)
        forward.geometry = torch.tensor([*video.grid, video.prefix], device="cpu")
        assert self._layers is not None, "attached"
        share(forward, module, self.family, self._layers.processors, inputs, video)
        forward.kv_len = video.kv_len
        moment = self.clock.at(inputs["timestep"])
        step = self.schedule.at(moment, inputs["timestep"], min(1.0, self.config.block / math.prod(video.grid)))
        self.clock.note(moment)
        forward.sparse = step is not None
        if step:
            forward.numbers = torch.tensor([step.sparsity, step.number], dtype=torch.float64, device="cpu")
        self._look_for_replaced(module)
        self.last_grid = video.grid
        forward.remember(inputs["timestep"])
        self._count(moment, step)

    def _count(self, moment: Moment | None, step: SparseStep | None) -> None:
        """Count one forward and, when the scheduler has moved on, one step."""
        del self._outer[self.forward.depth - 1 :]
        self._outer.append(_Counted(self._step, self._replaced, {path: one.ran for path, one in self.records.items()}))
        kind = "sparse" if step else "dense"
        self.counts.forwards[kind] += 1
        if moment is None or not moment.is_step_of(self._last_moment):
            self.counts.steps[kind] += 1
        if moment and not (self._last_moment and moment.run is self._last_moment.run):
            self.log.clear()
        self._last_moment, self._step = moment, step
        for record in self.records.values():
            record.ran = ""

    def end(self, output: Any) -> None:
        """Count the calls of the forward that is over, and keep what its sparse ones left."""
        try:
            if self.forward.end(output):  # not if it failed before it began, or was no new one
                self._count_calls(failed=output is None)
                self._go_on_with_outer()
        finally:
            self.forward.leave()

    def _go_on_with_outer(self) -> None:
        outer = self._outer.pop()
        if self._outer:
            self._step, self._replaced = outer.step, outer.replaced
            for path, record in self.records.items():
                record.ran = outer.ran[path]

    def _count_calls(self, failed: bool) -> None:
        ran = collections.Counter(record.ran for record in self.records.values())
        sparse = self._step is not None
        self.counts.calls["sparse"] += ran["sparse"]
        self.counts.calls["step"] += 0 if sparse else ran["dense"]
        self.counts.calls["mask"] += ran["mask"]
        if failed:  # layers that it did not reach were not skipped
            return
        self.counts.calls["skipped"] += ran[""] - self._replaced
        if len(self.records) == ran[""] > 0 and not self._replaced:
            self.counts.skipped_forwards += 1
        else:
            self.counts.calls["layer"] += len(self.dense_layers)
        if self._step and ran["sparse"]:
            calls = {
                path: record.call for path, record in self.records.items() if record.call and record.ran == "sparse"
            }
            self.log.append(SparseForward(self._step, calls))
            if self.schedule.feedback:
                self.schedule.feedback.note(Reading((call.squares for call in calls.values()), self.forward.ranks))

    def _look_for_replaced(self, transformer: nn.Module) -> None:
        """Notice layers whose processor somebody has replaced since: they run dense unless they are patched again."""
        assert self._layers is not None, "attached"
        replaced = self._layers.replaced()
        self._replaced = len(replaced)
        if not replaced or not self.forward.sparse:
            return
        if not self.counts.calls["replacement"]:
            found = type(replaced[0]).__name__
            warnings.warn(
                f"{len(replaced)} attention layers of {type(transformer).__name__} lost draft attention: something "
                f"put {found} in its place. They run without it. Undo that, or enable draft attention again.",
                stacklevel=2,
            )
        self.counts.calls["replacement"] += len(replaced)


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
