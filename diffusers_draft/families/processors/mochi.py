"""Mochi without a loop over samples: padded text is moved to the end, as cutting it would wait for the GPU."""

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor
from torch.nn import functional


def attend_to_valid_text(
    self: Any,
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    attention_mask: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Run attention as `MochiAttnProcessor2_0.__call__`, with equal results up to rounding.

    Like upstream, move valid text to the front and leave its output there.

    Args:
        self: the processor.
        attn: the `MochiAttention`.
        hidden_states: `(B, V, C)` video.
        encoder_hidden_states: `(B, L, C)` text.
        attention_mask: `(B, L)` valid text.
        image_rotary_emb: cosines and sines, `(V, H, D / 2)`.

    Returns:
        Video and text after attention.
    """
    video = [layer(hidden_states).unflatten(2, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v)]
    added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    text = [layer(encoder_hidden_states).unflatten(2, (attn.heads, -1)) for layer in added]
    video[:2] = attn.norm_q(video[0]), attn.norm_k(video[1])
    text[:2] = attn.norm_added_q(text[0]), attn.norm_added_k(text[1])
    if image_rotary_emb is not None:
        video[:2] = (_rotate(tensor, *image_rotary_emb) for tensor in video[:2])

    padding, order = (attention_mask == 0).int().sort(dim=1, stable=True)
    text = [tensor.take_along_dim(order[:, :, None, None], dim=1) for tensor in text]
    query, key, value = (torch.cat(pair, dim=1) for pair in zip(video, text, strict=True))
    valid = functional.pad(padding == 0, (hidden_states.shape[1], 0), value=True)
    out = dispatch_attention_fn(query, key, value, attn_mask=valid[:, None, None]).flatten(2)

    hidden_states, encoder_hidden_states = out.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
    encoder_hidden_states = encoder_hidden_states.masked_fill(padding[..., None] == 1, 0)
    hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
    if hasattr(attn, "to_add_out"):
        encoder_hidden_states = attn.to_add_out(encoder_hidden_states)
    return hidden_states, encoder_hidden_states


def _rotate(tokens: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    even, odd = tokens.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = (even * cosines - odd * sines, even * sines + odd * cosines)
    return torch.stack(turned, dim=-1).flatten(-2).to(tokens.dtype)
