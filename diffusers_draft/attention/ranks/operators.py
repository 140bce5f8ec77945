"""Operators of `exchange.Exchange`. In draft attention, some heads attend while others are on their way.

Custom ops, so that compiled code neither looks inside nor reuses the memory of what is being sent.
"""

from itertools import pairwise

import torch
from torch import Tensor

from ..ops import attend_now, empty_facts
from .transfer import Underway, group_named, place, start_to_heads, start_to_tokens

PARTS = 2
"""Parts of a rank's heads. The second is received, and the first sent back, while the other attends.

More parts cover more of the exchange, but what travels slows attention down. Attention with its exchange on two H200s
in bfloat16, in one, two, three and four parts: 23.0, 23.0, 23.3 and 24.3 ms for HunyuanVideo at 768p, 32.8, 32.5, 32.8
and 33.9 ms for Wan 14B. A smaller first part changes nothing: 22.1 ms for 6 and 6 heads, 22.4 for 3 and 9.
"""


@torch.library.custom_op("diffusers_draft::to_heads", mutates_args=())
def to_heads(query: Tensor, key: Tensor, value: Tensor, group: str, tokens: list[int]) -> Tensor:
    """Receive all tokens of this rank's heads.

    Args:
        query: `(B, S on this rank or more, H, D)`.
        key: as `query`.
        value: as `query`.
        group: name of the ranks' process group.
        tokens: how many come from each rank.

    Returns:
        `(3, S, B, H / ranks, D)`.
    """
    return start_to_heads(query, key, value, group_named(group), tokens).wait()


@to_heads.register_fake
def _(query, key, value, group, tokens):
    return query.new_empty(3, sum(tokens), query.shape[0], query.shape[2] // len(tokens), query.shape[3])


@torch.library.custom_op("diffusers_draft::to_tokens", mutates_args=())
def to_tokens(out: Tensor, group: str, size: int, split: int) -> Tensor:
    """Receive this rank's tokens, of all heads.

    Args:
        out: `(B, S, H / ranks, D)`.
        group: name of the ranks' process group.
        size: number of ranks.
        split: tokens of each rank; those behind all ranks' go to every rank.

    Returns:
        `(B, S on this rank, H, D)`.
    """
    return place([start_to_tokens(out, group_named(group), split).wait()])


@to_tokens.register_fake
def _(out, group, size, split):
    return out.new_empty(out.shape[0], out.shape[1] - (size - 1) * split, size * out.shape[2], out.shape[3])


@torch.library.custom_op("diffusers_draft::attend_over_ranks", mutates_args=())
def attend_over_ranks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: str,
    tokens: list[int],
    geometry: Tensor,
    kv_len: Tensor | None,
    numbers: Tensor,
    method: Tensor,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run draft attention of all tokens, for this rank's; arguments as of `to_heads` and `ops.attend`.

    Returns:
        `ops.Attended` of this rank's heads, `out` having this rank's tokens of all heads.
    """
    ranks = group_named(group)
    arriving: list[Underway] = []
    leaving: list[Underway] = []
    found: list[list[Tensor]] = []
    try:
        for part in _parts(query.shape[2] // ranks.size()):
            arriving.append(start_to_heads(query, key, value, ranks, tokens, part))
        while arriving:  # a part is let go when it has attended
            q, k, v = arriving.pop(0).wait().transpose(1, 2)
            out, *counted = attend_now(q, k, v, geometry, kv_len, numbers, method, scale)
            leaving.append(start_to_tokens(out, ranks, tokens[0]))
            found.append(counted)
    finally:  # also after an error: or the rest would meet the next call's, in memory that is free by then
        came = [part.wait() for part in (*arriving, *leaving)]
    pairs, squares, facts = (torch.stack(counted) for counted in zip(*found, strict=True))
    facts[:, 0] = facts[:, 0].sum()  # heads
    return place(came), pairs.sum(0), squares.sum(0), facts[-1].clone()


def _parts(heads: int) -> list[slice]:
    parts = min(PARTS, heads)
    return [slice(*bounds) for bounds in pairwise(heads * part // parts for part in range(parts + 1))]


@attend_over_ranks.register_fake
def _(query, key, value, group, tokens, geometry, kv_len, numbers, method, scale):
    return query.new_empty(query.shape), *empty_facts(query)
