"""Looks into one attention layer: the queries and keys of its last call."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass
class QueryKey:
    """Queries and keys of one attention call, `(B, S, H, D)` in the model's token order, rotary embedding applied."""

    query: Tensor | None = None
    key: Tensor | None = None


@contextmanager
def captured(layer: nn.Module) -> Iterator[QueryKey]:
    """Keeps the queries and keys of the layer's last call, which runs as if nobody looked.

    Args:
        layer: an attention layer with diffusers' own processor, for example `transformer.blocks[1].attn1`.

    Yields:
        What is filled by every call of the layer.

    Raises:
        ValueError: if the layer has another processor, for example while draft attention is enabled.
    """
    name = type(layer.processor).__module__
    if not name.startswith("diffusers."):
        raise ValueError(f"Need diffusers' own processor, got {type(layer.processor).__name__}. Capture a dense run.")
    module: Any = importlib.import_module(name)
    stock = module.dispatch_attention_fn
    tensors = QueryKey()

    def record(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        tensors.query, tensors.key = query.detach(), key.detach()
        return stock(query, key, *args, **kwargs)

    # The name is ours only while this layer runs; a hook that returned anything would replace the layer's output.
    def before(layer: nn.Module, args: tuple[Any, ...]) -> None:
        module.dispatch_attention_fn = record

    def after(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        module.dispatch_attention_fn = stock

    hooks = [layer.register_forward_pre_hook(before), layer.register_forward_hook(after, always_call=True)]
    try:
        yield tensors
    finally:
        for hook in hooks:
            hook.remove()
