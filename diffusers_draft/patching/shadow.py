"""How a stock attention processor gets our attention call.

Every diffusers processor ends in one call of a module global: `dispatch_attention_fn`, or in older ones
`F.scaled_dot_product_attention`. A subclass runs upstream's own `__call__` code with that one name bound to ours, so
that nothing upstream does is copied here. The few families whose stock code wastes what sparsity saves bring a
`__call__` of their own, which runs in the same way.
"""

import functools
import itertools
import sys
import types
import weakref
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from ..families.family import Family
from .dispatch import Dispatch, attention_call
from .forward import Forward
from .late_backward import LateBackward
from .records import LayerRecord

_numbers = itertools.count()


class Shadow:
    """Subclasses of stock processor classes for one transformer, each made once.

    `torch.compile` ties its code to classes: new ones for new settings would be compiled again.

    Args:
        family: the transformer's.

    Attributes:
        forward: what forwards leave for the layers.
    """

    def __init__(self, family: Family) -> None:
        self.forward = Forward()
        self._family = family
        self._classes: dict[type, type[DraftProcessor]] = {}
        self._modules: dict[str, types.ModuleType] = {}
        self._forget: weakref.finalize | None = None
        self._late = LateBackward(self.forward)

    def class_for(self, stock: type) -> "type[DraftProcessor]":
        """Get the subclass of a stock processor class."""
        if stock not in self._classes:
            self._classes[stock], modules = _patched_class(stock, self.forward, self._family)
            self._modules |= {module.__name__: module for module in modules}
        return self._classes[stock]

    def await_backward(self, layers: list[nn.Module]) -> None:
        """Let layers that have lost draft attention refuse a backward of what they did with it, if one may come."""
        if self.forward.is_awaited:
            self._late.watch(layers)

    def stop_waiting(self, layers: list[nn.Module]) -> None:
        """Let layers do what they will: they have draft attention again."""
        self._late.leave(layers)

    def show(self, transformer: nn.Module) -> None:
        """Put the modules in `sys.modules`: `torch.compile` looks up a function's globals by module name."""
        sys.modules.update(self._modules)
        self._forget = weakref.finalize(transformer, _drop_modules, list(self._modules))

    def hide(self) -> None:
        """Take the modules out of `sys.modules`. Harmless when done twice."""
        if self._forget is not None:
            self._forget()


class DraftProcessor:
    """Mixed into a stock processor class."""

    _stock: type
    record: LayerRecord

    @classmethod
    def wrapping(cls, original: Any, record: LayerRecord) -> Any:
        """Make a processor with the attributes of the original."""
        processor = cls.__new__(cls)
        processor.__dict__.update(original.__dict__, record=record)
        return processor

    def unwrapped(self, original: Any) -> Any:
        """Give the original back, with what was set on us meanwhile, such as an attention backend."""
        original.__dict__.update(self._stock_attributes())
        return original

    def _stock_attributes(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "record"}

    def __reduce__(self) -> Any:
        return (object.__new__, (self._stock,), self._stock_attributes())


def stock_class(processor: Any) -> type:
    """Get the diffusers class of a processor, or the one that ours stands in for."""
    return processor._stock if isinstance(processor, DraftProcessor) else type(processor)


def can_be_patched(stock: Any, family: Family) -> bool:
    """Return True if the code of a processor class ends in a call that we know."""
    names = stock.__call__.__code__.co_names
    return family.explicit is not None or "dispatch_attention_fn" in names or "scaled_dot_product_attention" in names


def _patched_class(
    stock: type, forward: Forward, family: Family
) -> tuple[type[DraftProcessor], list[types.ModuleType]]:
    """Subclass a stock processor; the modules hold upstream's globals with our attention call."""
    upstream: Any = stock.__call__
    source = family.explicit or upstream
    name = f"{__name__}.{stock.__name__}_{next(_numbers)}"
    modules = []
    if "dispatch_attention_fn" in source.__code__.co_names:
        ours = attention_call(forward, source.__globals__["dispatch_attention_fn"])
        bound: dict[str, Any] = {"dispatch_attention_fn": ours}
    else:
        sdpa = {"scaled_dot_product_attention": _sdpa(attention_call(forward, _as_dispatch))}
        modules.append(_shadow_module(f"{name}_functional", functional.__dict__, sdpa))
        bound = {"F": modules[0]}
    modules.append(_shadow_module(name, source.__globals__, bound))
    call = types.FunctionType(
        source.__code__, modules[-1].__dict__, source.__name__, source.__defaults__, source.__closure__
    )
    call.__kwdefaults__ = source.__kwdefaults__
    stock_when_dense = family.stock_when_dense

    @functools.wraps(upstream)
    def __call__(processor: Any, *args: Any, **kwargs: Any) -> Any:
        forward.enter(processor.record)
        state = forward.here()
        if stock_when_dense and not state.sparse and state.hook is None:
            return upstream(processor, *args, **kwargs)
        return call(processor, *args, **kwargs)

    return type(f"Draft{stock.__name__}", (DraftProcessor, stock), {"__call__": __call__, "_stock": stock}), modules


def _shadow_module(name: str, upstream: dict[str, Any], bound: dict[str, Any]) -> types.ModuleType:
    """Make a module of upstream's globals, where some names are bound to ours."""
    shadow = types.ModuleType(name)
    own = ("__name__", "__spec__", "__loader__", "__file__")
    shadow.__dict__.update({key: value for key, value in upstream.items() if key not in own} | bound)
    return shadow


def _drop_modules(names: list[str]) -> None:
    for name in names:
        sys.modules.pop(name, None)


def _sdpa(dispatch: Dispatch) -> Dispatch:
    """Give our attention call the form of `F.scaled_dot_product_attention`, whose tensors are `(B, H, S, D)`."""

    def scaled_dot_product_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return dispatch(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa).transpose(1, 2)

    return scaled_dot_product_attention


def _as_dispatch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_kwargs: None,
    backend: None,
    parallel_config: None,
    **kwargs: Any,
) -> Tensor:
    """Give `F.scaled_dot_product_attention` the form of `dispatch_attention_fn`, whose tensors are `(B, S, H, D)`."""
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return functional.scaled_dot_product_attention(query, key, value, **kwargs).transpose(1, 2)
