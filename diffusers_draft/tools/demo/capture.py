"""Capture of queries, keys and values of one attention layer."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from ...api import enable_draft_attention
from ...patching.attachment import attachment_of
from ...patching.forward import AttentionCall
from ...patching.processors import attention_module


@dataclass
class Captured:
    """Tensors of one attention call, `(B, S, H, D)` in the model's token order, rotary embedding applied."""

    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None


@contextmanager
def captured(transformer: nn.Module, layer: str) -> Iterator[Captured]:
    """Capture queries, keys and values of a layer's last call, without changing its output beyond rounding.

    Args:
        transformer: a supported transformer.
        layer: path of a video self-attention layer with diffusers' own processor, for example `"blocks.1.attn1"`.

    Yields:
        The tensors, which every call of the layer replaces.

    Raises:
        ValueError: if the layer has another processor, or while draft attention is enabled.
    """
    if attachment_of(transformer) is not None:
        raise ValueError("Draft attention is enabled. Disable it first: capture a dense run.")
    processor = attention_module(transformer, layer).processor
    if not type(processor).__module__.startswith("diffusers."):
        raise ValueError(f"Need diffusers' own processor, got {type(processor).__name__}.")
    tensors = Captured()

    def look(call: AttentionCall) -> None:
        if call.path == layer:
            tensors.query, tensors.key, tensors.value = (tensor.detach() for tensor in call[:3])

    all_dense = enable_draft_attention(transformer, dense_timestep=-math.inf, dense_layers=())
    with all_dense, all_dense._watched(look):
        yield tensors
