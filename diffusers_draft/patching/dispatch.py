"""Our attention call in place of diffusers' own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..attention.ops import Attended, attend
from ..attention.ranks.exchange import Exchange
from .context_parallel import context_parallel
from .forward import AttentionCall, Forward, LayerState
from .records import SparseCall

Dispatch = Callable[..., Tensor]


def attention_call(forward: Forward, stock: Dispatch) -> Dispatch:
    """Make a stand-in for diffusers' `dispatch_attention_fn` (models/attention_dispatch.py), argument by argument.

    Args:
        forward: says whether a call is sparse, and how.
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
        state = forward.here()
        # A mask over keys alone is the padding that `kv_len` leaves out; layers without one see no padding.
        masked = attn_mask is not None and (state.kv_len is None or attn_mask.shape[-2] > 1)
        if masked and state.sparse:
            state.layer.ran = "mask"
        sparse = state.sparse and not masked
        if sparse and (dropout_p or is_causal or enable_gqa or attention_kwargs):
            raise NotImplementedError(
                "Draft attention has no dropout, causal or grouped-query attention and takes no attention_kwargs; got "
                f"dropout_p={dropout_p}, is_causal={is_causal}, enable_gqa={enable_gqa}, {attention_kwargs=}."
            )
        exchange = exchange_of(state, parallel_config)
        kv_len = None
        if attn_mask is not None and state.kv_len is not None:
            kv_len = _lengths_of(query, state.kv_len, attn_mask, exchange)
        if sparse and state.hook is None:
            run = exchange.attend if exchange else attend
            how = state.geometry, kv_len, state.numbers, state.method, scale
            return _noted(state, kv_len, run(query, key, value, *how))

        if exchange:
            query, key, value = exchange.to_heads(query, key, value)
        out = _hooked(state, query, key, value, kv_len, scale, sparse)
        if out is None:
            out = stock(
                query,
                key,
                value,
                attn_mask=exchange.whole_mask(attn_mask, query.shape[1]) if exchange else attn_mask,
                dropout_p=dropout_p,
                is_causal=is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
                attention_kwargs=attention_kwargs,
                backend=backend,
                parallel_config=None if exchange else parallel_config,
            )
        return exchange.to_tokens(out) if exchange else out

    return dispatch_attention_fn


def exchange_of(state: LayerState, parallel_config: Any) -> Exchange | None:
    """Make the exchange of a forward that is split over GPUs; None if it is not.

    Args:
        state: knows what the ranks share.
        parallel_config: what diffusers hands its attention calls.
    """
    split = context_parallel(parallel_config)
    if not split or state.shared is None:
        return None
    return Exchange(split._ulysses_mesh.get_group(), state.shared.shape[0], state.whole_text)


def _lengths_of(query: Tensor, kv_len: Tensor, mask: Tensor, exchange: Exchange | None) -> Tensor:
    """Find the valid lengths of the samples that a layer gets."""
    if len(kv_len) == len(query):
        return kv_len.to(query.device)
    # Below the hook that learned the lengths, diffusers' FasterCache leaves out the first half of a guided batch, but
    # not of inputs that it does not know. Only the layer's mask tells which texts are together then.
    elsewhere = exchange.shared - exchange.shared // exchange.size if exchange else 0
    padded = ~mask if mask.dtype == torch.bool else mask < 0
    lengths = query.shape[1] + elsewhere - padded.flatten(0, -2).sum(1, dtype=torch.int32)
    return lengths.expand(len(query))


def _hooked(
    state: LayerState,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_len: Tensor | None,
    scale: float | None,
    sparse: bool,
) -> Tensor | None:
    """Show a call to the hook, if there is one; None where stock attention is to run."""
    if state.hook is None:
        return None
    how = state.geometry, kv_len, state.numbers, state.method, scale
    found = state.hook(AttentionCall(query, key, value, *how, sparse, state.layer.path))
    if found is None and sparse:
        found = attend(query, key, value, *how)
    return _noted(state, kv_len, found) if isinstance(found, Attended) else found


def _noted(state: LayerState, kv_len: Tensor | None, attended: Attended) -> Tensor:
    """Keep what was computed in the layer's record. On the meta device nothing was."""
    if attended.pairs.device.type == "meta":
        return attended.out
    state.layer.ran = "sparse"
    state.layer.call = SparseCall(kv_len, attended.pairs, attended.squares, attended.facts)
    return attended.out
