"""Puts draft attention into a transformer: how its layers get our attention, and how a forward learns its grid."""

import contextlib
import functools
import warnings
import weakref
from typing import Any

import torch
from torch import nn

from ..attention.call import check_backend
from ..config import DraftConfig
from ..families import Family, inputs_of
from .dispatch import State, attention_call
from .layers import PatchedLayers
from .schedule import Schedule
from .splitting import originals_of, share


class Attachment:
    """Draft attention in one transformer: its forward pre-hook, its patched layers and what they counted.

    Attributes:
        dense_layers: module paths of the layers left alone.
        steps: denoising steps so far, dense and sparse.
        forwards: forwards so far, likewise.
        masked_calls: calls that ran dense because of a mask.
        replaced_calls: calls of layers whose processor was replaced after draft attention was enabled.
        last_sparse: grid of the last sparse forward.
    """

    def __init__(
        self,
        transformer: nn.Module,
        family: Family,
        config: DraftConfig,
        schedule: Schedule,
        sparse_layers: tuple[str, ...],
        dense_layers: tuple[str, ...],
    ) -> None:
        check_backend(config.backend)
        self.transformer = weakref.ref(transformer)
        self.family = family
        self.config = config
        self.schedule = schedule
        self.sparse_layers = sparse_layers
        self.dense_layers = dense_layers
        self.state = State()
        self.steps = {"dense": 0, "sparse": 0}
        self.forwards = {"dense": 0, "sparse": 0}
        self.masked_calls = 0
        self.replaced_calls = 0
        self.last_sparse: tuple[int, int, int] | None = None
        self._last_step: tuple[int, int] | None = None
        self.layers: PatchedLayers | None = None
        self._hook: Any = None

    def attach(self) -> None:
        """Puts the processors and the hook in place, or nothing if any of it fails."""
        transformer = self.transformer()
        assert transformer is not None, "the transformer is held by the caller"
        originals = originals_of(transformer, self.sparse_layers)
        if self.layers is None or self.layers.originals != originals:
            dispatch = functools.partial(attention_call, self.state, self.config)
            self.layers = PatchedLayers(transformer, originals, self.state, self.family, dispatch)
        try:
            self.layers.put()
            self._hook = transformer.register_forward_pre_hook(self, with_kwargs=True)
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Restores every stock processor that is still replaced by ours. Harmless when done twice."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self.state.sparse = False  # whoever keeps one of our processors and puts it back gets dense attention
        if self.layers is not None:
            self.layers.take_back()

    @property
    def processors(self) -> dict[str, Any]:
        """Ours, by module path, in execution order."""
        return self.layers.processors if self.layers else {}

    @property
    def attached(self) -> bool:
        return self._hook is not None

    # `torch.compile` calls a module's hooks outside the graph of its forward, so this one may simply stay eager.
    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The forward pre-hook: learns the grid and the lengths, decides dense or sparse, and counts."""
        inputs = inputs_of(module, args, kwargs)
        video = self.family.video(inputs, module.config)
        self.state.geometry = torch.tensor([*video.grid, video.prefix])
        share(self.state, module, self.family, self.processors, inputs, video)
        self.state.kv_len = video.kv_len
        if torch.is_grad_enabled() and getattr(module, "gradient_checkpointing", False):
            self.state.forwards_to_recompute = 1 if self.state.recomputed else self.state.forwards_to_recompute + 1
            self.state.recomputed = False
        dense = self.schedule.is_dense(inputs["timestep"])
        self.state.sparse = not dense
        if not dense:
            self.last_sparse = video.grid
            self._look_for_replaced(module)
        self._count(dense)

    def _count(self, dense: bool) -> None:
        """Counts one forward and, when the scheduler has moved on, one step."""
        kind = "dense" if dense else "sparse"
        self.forwards[kind] += 1
        if self.schedule.now is None or self.schedule.now != self._last_step:
            self.steps[kind] += 1
        self._last_step = self.schedule.now
        for processor in self.processors.values():
            self.masked_calls += processor.masked
            processor.masked = False

    def _look_for_replaced(self, transformer: nn.Module) -> None:
        """Notices layers whose processor somebody has replaced since: they run dense unless they are patched again."""
        replaced = self.layers.replaced() if self.layers else []
        if replaced and not self.replaced_calls:
            found = type(replaced[0]).__name__
            warnings.warn(
                f"{len(replaced)} attention layers of {type(transformer).__name__} lost draft attention: something "
                f"put {found} in its place. They run without it. Undo that, or enable draft attention again.",
                stacklevel=2,
            )
        self.replaced_calls += len(replaced)

    def __reduce__(self) -> Any:
        # A copy or a pickle of a patched transformer is a stock transformer, with a hook from the standard library
        # that takes three arguments and does nothing.
        return (getattr, (contextlib.nullcontext(), "__exit__"))


def attachment_of(transformer: nn.Module) -> Attachment | None:
    """Draft attention that is in place in a transformer."""
    hooks = transformer._forward_pre_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, Attachment)), None)
