"""How a stock attention processor gets our attention call.

Every diffusers processor ends in one call of a module global: `dispatch_attention_fn`, or in older ones
`F.scaled_dot_product_attention`. A subclass runs upstream's own `__call__` code with that one name bound to ours, so
that nothing upstream does is copied here. The few families whose stock code wastes what sparsity saves bring a
`__call__` of their own, which runs in the same way.
"""

import functools
import itertools
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional

from ..families import Family

Dispatch = Callable[..., Tensor]
_numbers = itertools.count()


def patched_class(stock: type, state: Any, family: Family, dispatch: Callable[[Dispatch], Dispatch]) -> type:
    """Subclasses a stock processor.

    Args:
        stock: its class.
        state: what forwards leave for the layers; its `enter` gets the processor that is about to run.
        family: has the `__call__` to run instead of upstream's, if there is one.
        dispatch: makes our attention call; takes the one to make where draft attention does not apply.
    """
    upstream: Any = stock.__call__
    source = family.explicit or upstream
    name = f"{__name__}.{stock.__name__}_{next(_numbers)}"
    shadows = []
    if "dispatch_attention_fn" in source.__code__.co_names:
        bound: dict[str, Any] = {"dispatch_attention_fn": dispatch(source.__globals__["dispatch_attention_fn"])}
    else:
        sdpa = {"scaled_dot_product_attention": _sdpa(dispatch(_as_dispatch))}
        shadows.append(_shadow_module(f"{name}_functional", functional.__dict__, sdpa))
        bound = {"F": shadows[0]}
    shadows.append(_shadow_module(name, source.__globals__, bound))
    call = types.FunctionType(
        source.__code__, shadows[-1].__dict__, source.__name__, source.__defaults__, source.__closure__
    )
    call.__kwdefaults__ = source.__kwdefaults__
    stock_when_dense = family.stock_when_dense

    @functools.wraps(upstream)
    def __call__(processor: Any, *args: Any, **kwargs: Any) -> Any:
        state.enter(processor)
        if stock_when_dense and not state.sparse:
            return upstream(processor, *args, **kwargs)
        return call(processor, *args, **kwargs)

    members = {"__call__": __call__, "_stock": stock, "shadows": shadows}
    return type(f"Draft{stock.__name__}", (DraftProcessor, stock), members)


def can_be_patched(stock: Any, family: Family) -> bool:
    """Says whether the code of a processor class ends in a call that we know."""
    names = stock.__call__.__code__.co_names
    return family.explicit is not None or "dispatch_attention_fn" in names or "scaled_dot_product_attention" in names


class DraftProcessor:
    """Mixed into a stock processor class."""

    _stock: type
    shadows: list[types.ModuleType]
    masked: bool
    kv_num_blocks: Tensor | None
    kv_len: Tensor | None

    @classmethod
    def wrapping(cls, original: Any) -> Any:
        processor = cls.__new__(cls)
        processor.__dict__.update(original.__dict__, masked=False, kv_num_blocks=None, kv_len=None)
        return processor

    def unwrapped(self, original: Any) -> Any:
        """The original, with what was set on us meanwhile, such as an attention backend."""
        original.__dict__.update(self._stock_attributes())
        return original

    def _stock_attributes(self) -> dict[str, Any]:
        ours = ("masked", "kv_num_blocks", "kv_len")
        return {name: value for name, value in self.__dict__.items() if name not in ours}

    def __reduce__(self) -> Any:
        return (object.__new__, (self._stock,), self._stock_attributes())


def _shadow_module(name: str, upstream: dict[str, Any], bound: dict[str, Any]) -> types.ModuleType:
    """Upstream's globals in a module of our own, where some names are bound to ours."""
    shadow = types.ModuleType(name)
    own = ("__name__", "__spec__", "__loader__", "__file__")
    shadow.__dict__.update({key: value for key, value in upstream.items() if key not in own} | bound)
    return shadow


def _sdpa(dispatch: Dispatch) -> Dispatch:
    """Our attention call in the form of `F.scaled_dot_product_attention`, whose tensors are `(B, H, S, D)`."""

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
    """`F.scaled_dot_product_attention` in the form of `dispatch_attention_fn`, whose tensors are `(B, S, H, D)`."""
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return functional.scaled_dot_product_attention(query, key, value, **kwargs).transpose(1, 2)
