"""Our attention call in place of diffusers' own, and what it must know of the forward that it is in."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..attention.call import attend, needs_grad
from ..attention.ranks.exchange import Exchange, context_parallel
from ..config import DraftConfig

Attend = Callable[..., tuple[Tensor, Tensor | None]]
"""Has the arguments and the result of `attention.attend`."""

_stand_in: Attend | None = None


@contextmanager
def attending(attend: Attend) -> Iterator[None]:
    """Calls `attend` wherever draft attention is enabled and runs sparse, for measurements and baselines.

    Over several GPUs it gets all tokens of this one's heads.
    """
    global _stand_in
    before, _stand_in = _stand_in, attend
    try:
        yield
    finally:
        _stand_in = before


class State:
    """What one forward leaves for its layers.

    Compiled code reads bools and tensors alone, so that no layer and no resolution recompiles.

    Attributes:
        shared: where the forward is split over GPUs, an empty tensor as long as the sequence that they share.
        whole_text: whether every GPU has tokens behind those.
    """

    def __init__(self) -> None:
        self.sparse = False
        self.shared: Tensor | None = None
        self.whole_text = False
        self.geometry = torch.zeros(4, dtype=torch.int64)
        self.kv_len: Tensor | None = None
        self.processor: Any = None
        self.forwards_to_recompute = 0
        self.recomputed = False
        self.kind: tuple[torch.dtype, int, bool] | None = None

    def enter(self, processor: Any) -> None:
        """Notes which layer's processor is about to run.

        Raises:
            RuntimeError: when gradient checkpointing recomputes a forward whose state a later one has replaced.
        """
        self.processor = processor
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:  # not in a backward
            return
        if self.forwards_to_recompute > 1:
            raise RuntimeError(
                f"{self.forwards_to_recompute} forwards ran before this backward. Under gradient checkpointing draft "
                "attention can recompute only the latest: run backward after each forward, or disable one of the two."
            )
        self.recomputed = True


def attention_call(state: State, config: DraftConfig, stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Makes a stand-in for diffusers' `dispatch_attention_fn` (models/attention_dispatch.py), argument by argument.

    Args:
        state: says whether a call is sparse.
        config: how, if it is.
        stock: diffusers' own, for calls that are dense.
    """

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
        exchange = None
        split = context_parallel(parallel_config)
        if split and state.shared is not None:
            exchange = Exchange(split._ulysses_mesh.get_group(), state.shared.shape[0], state.whole_text)
        if masked or not state.sparse:
            if exchange:
                query, key, value = exchange.to_heads(query, key, value)
                attn_mask = exchange.whole_mask(attn_mask, query.shape[1])
            out = stock(
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
                parallel_config=None if exchange else parallel_config,
            )
            return exchange.to_tokens(out) if exchange else out
        if dropout_p or is_causal or enable_gqa or attention_kwargs:
            raise NotImplementedError(
                "Draft attention has no dropout, causal or grouped-query attention and takes no attention_kwargs; got "
                f"dropout_p={dropout_p}, is_causal={is_causal}, enable_gqa={enable_gqa}, {attention_kwargs=}."
            )
        kv_len = None if attn_mask is None or state.kv_len is None else state.kv_len.to(query.device)
        state.kind = (query.dtype, query.shape[-1], needs_grad(query, key, value))
        how = state.geometry, kv_len, config, scale
        out, state.processor.kv_num_blocks = _attend(exchange, query, key, value, *how)
        state.processor.kv_len = kv_len
        return out

    return dispatch_attention_fn


def _attend(
    exchange: Exchange | None, query: Tensor, key: Tensor, value: Tensor, *how: Any
) -> tuple[Tensor, Tensor | None]:
    if _stand_in is None:
        return (exchange.attend if exchange else attend)(query, key, value, *how)
    if exchange is None:
        return _stand_in(query, key, value, *how)
    out, kept = _stand_in(*exchange.to_heads(query, key, value), *how)
    return exchange.to_tokens(out), kept
