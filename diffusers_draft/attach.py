"""Puts draft attention into a transformer: how its layers get our attention, and how a forward learns its grid."""

import contextlib
import functools
import inspect
import sys
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .attention import attend, check_backend, needs_grad
from .config import DraftConfig
from .families import Family
from .schedule import Schedule
from .shadow import patched_class


def attention_module(transformer: nn.Module, path: str) -> Any:
    """The attention layer at a module path; it has a `processor`."""
    return transformer.get_submodule(path)


class State:
    """What one forward leaves for its layers.

    Compiled code reads bools and tensors alone, so that no layer and no resolution recompiles.
    """

    def __init__(self) -> None:
        self.sparse = False
        self.geometry = torch.zeros(4, dtype=torch.int64)
        self.kv_len: Tensor | None = None
        self.processor: Any = None
        self.forwards_to_recompute = 0
        self.recomputed = False
        self.kind: tuple[torch.dtype, int, bool] | None = None


class Attachment:
    """Draft attention in one transformer: its forward pre-hook, its patched layers and what they counted.

    Attributes:
        originals: stock processor of each sparse layer, by module path, in execution order.
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
        originals: dict[str, Any],
        dense_layers: tuple[str, ...],
    ) -> None:
        check_backend(config.backend)
        self.transformer = weakref.ref(transformer)
        self.family = family
        self.config = config
        self.schedule = schedule
        self.originals = originals
        self.dense_layers = dense_layers
        self.state = State()
        self.steps = {"dense": 0, "sparse": 0}
        self.forwards = {"dense": 0, "sparse": 0}
        self.masked_calls = 0
        self.replaced_calls = 0
        self.last_sparse: tuple[int, int, int] | None = None
        self._last_step: tuple[int, int] | None = None
        self._parameters = tuple(inspect.signature(type(transformer).forward).parameters)[1:]
        dispatch = functools.partial(_dispatch, self.state, config)
        classes = dict.fromkeys(type(original) for original in originals.values())
        patched: dict[type, Any] = {stock: patched_class(stock, self.state, family, dispatch) for stock in classes}
        self._shadows = [module for cls in patched.values() for module in cls.shadows]
        self.processors = {path: patched[type(original)].wrapping(original) for path, original in originals.items()}
        self._hook: Any = None
        self._forget: weakref.finalize | None = None

    def attach(self) -> None:
        """Puts the processors and the hook in place, or nothing if any of it fails."""
        transformer = self.transformer()
        assert transformer is not None, "the transformer is held by the caller"
        # In `sys.modules` because `torch.compile` looks up a function's globals by module name.
        sys.modules.update({module.__name__: module for module in self._shadows})
        self._forget = weakref.finalize(transformer, _drop_modules, [module.__name__ for module in self._shadows])
        try:
            for path, processor in self.processors.items():
                attention_module(transformer, path).processor = processor
            self._hook = transformer.register_forward_pre_hook(self, with_kwargs=True)
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Restores every stock processor that is still replaced by ours. Harmless when done twice."""
        transformer = self.transformer()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self.state.sparse = False  # whoever keeps one of our processors and puts it back gets dense attention
        if transformer is not None:
            for path, processor in self.processors.items():
                module = attention_module(transformer, path)
                if module.processor is processor:
                    module.processor = processor.unwrapped(self.originals[path])
        if self._forget is not None:
            self._forget()

    @property
    def attached(self) -> bool:
        return self._hook is not None

    # `torch.compile` calls a module's hooks outside the graph of its forward, so this one may simply stay eager.
    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The forward pre-hook: learns the grid and the lengths, decides dense or sparse, and counts."""
        inputs = dict(zip(self._parameters, args, strict=False)) | kwargs
        video = self.family.video(inputs, module.config)
        self.state.geometry = torch.tensor([*video.grid, video.prefix])
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
        replaced = [
            path for path, ours in self.processors.items() if attention_module(transformer, path).processor is not ours
        ]
        if replaced and not self.replaced_calls:
            found = type(attention_module(transformer, replaced[0]).processor).__name__
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


def _drop_modules(names: list[str]) -> None:
    for name in names:
        sys.modules.pop(name, None)


def _dispatch(state: State, config: DraftConfig, stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Makes a stand-in for diffusers' `dispatch_attention_fn` (models/attention_dispatch.py), argument by argument."""

    def dispatch_attention_fn(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        attention_kwargs: dict[str, Any] | None = None,
        *,
        backend: Any = None,
        parallel_config: Any = None,
    ) -> Tensor:
        # A mask over keys alone is the padding that `kv_len` leaves out; layers without one see no padding.
        masked = attn_mask is not None and (state.kv_len is None or attn_mask.shape[-2] > 1)
        if masked:
            state.processor.masked = state.sparse
        if not torch.compiler.is_compiling():
            _check_recomputation(state)
        if masked or not state.sparse:
            return stock(
                query,
                key,
                value,
                attn_mask=attn_mask,
                dropout_p=dropout_p,
                is_causal=is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
                attention_kwargs=attention_kwargs,
                backend=backend,
                parallel_config=parallel_config,
            )
        if dropout_p or is_causal or enable_gqa or attention_kwargs:
            raise NotImplementedError(
                "Draft attention has no dropout, causal or grouped-query attention and takes no attention_kwargs; got "
                f"dropout_p={dropout_p}, is_causal={is_causal}, enable_gqa={enable_gqa}, {attention_kwargs=}."
            )
        check_parallel_config(parallel_config)
        kv_len = None if attn_mask is None or state.kv_len is None else state.kv_len.to(query.device)
        state.kind = (query.dtype, query.shape[-1], needs_grad(query, key, value))
        out, state.processor.kv_num_blocks = attend(query, key, value, state.geometry, kv_len, config, scale)
        state.processor.kv_len = kv_len
        return out

    return dispatch_attention_fn


def _check_recomputation(state: State) -> None:
    """Raises RuntimeError when gradient checkpointing recomputes a forward whose state a later one has replaced."""
    if torch._C._current_graph_task_id() == -1:  # not in a backward
        return
    if state.forwards_to_recompute > 1:
        raise RuntimeError(
            f"{state.forwards_to_recompute} forwards ran before this backward. Under gradient checkpointing draft "
            "attention can recompute only the latest: run backward after each forward, or disable one of the two."
        )
    state.recomputed = True


def check_parallel_config(parallel_config: Any) -> None:
    """Raises NotImplementedError for context parallelism."""
    context_parallel = getattr(parallel_config, "context_parallel_config", None)
    if context_parallel is None:
        return
    if getattr(context_parallel, "ring_degree", None) not in (None, 1):
        raise NotImplementedError(
            f"Draft attention cannot run with ring attention (ring_degree={context_parallel.ring_degree}): no rank "
            "sees the whole sequence, so none can choose the best blocks. Disable draft attention or the ring."
        )
    raise NotImplementedError("Draft attention does not run under context parallelism yet. Disable one of the two.")
