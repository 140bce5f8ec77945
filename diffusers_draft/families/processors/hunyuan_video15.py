"""HunyuanVideo 1.5 with a mask over keys; the stock processor makes one over all pairs of tokens in every layer."""

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor
from torch.nn import functional


def attend_with_key_mask(
    self: Any,
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Run attention as `HunyuanVideo15AttnProcessor2_0.__call__`, with equal results for the video and valid text.

    Args:
        self: the processor.
        attn: the `Attention`.
        hidden_states: `(B, V, C)` video.
        encoder_hidden_states: `(B, L, C)` text, valid tokens first.
        attention_mask: `(B, L)` valid text.
        image_rotary_emb: cosines and sines, `(V, D)`.

    Returns:
        Video and text after attention.
    """
    assert encoder_hidden_states is not None and attention_mask is not None, "its blocks are all of two streams"
    video = [layer(hidden_states).unflatten(2, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v)]
    added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    text = [layer(encoder_hidden_states).unflatten(2, (attn.heads, -1)) for layer in added]
    video[:2] = attn.norm_q(video[0]), attn.norm_k(video[1])
    text[:2] = attn.norm_added_q(text[0]), attn.norm_added_k(text[1])
    if image_rotary_emb is not None:
        video[:2] = (apply_rotary_emb(tensor, image_rotary_emb, sequence_dim=1) for tensor in video[:2])

    query, key, value = (torch.cat(pair, dim=1) for pair in zip(video, text, strict=True))
    valid = functional.pad(attention_mask.bool(), (hidden_states.shape[1], 0), value=True)
    out = dispatch_attention_fn(
        query,
        key,
        value,
        attn_mask=valid[:, None, None],
        backend=self._attention_backend,
        parallel_config=self._parallel_config,
    ).flatten(2)

    hidden_states, encoder_hidden_states = out.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
    return attn.to_out[1](attn.to_out[0](hidden_states)), attn.to_add_out(encoder_hidden_states)
